"""The room that replicas make, and what is shown of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.capacity import Capacity, Replicas, cause, deployments
from raymodels.serve.fair_queue import Room
from raymodels.serve.routing import Route

TABLE = {"lm": Route({"lm--v1": 0.9, "lm--v2": 0.1}), "other": Route({"other--v1": 1.0})}
ENGINES = {"lm--v1": EngineConfig(max_batch=8, max_queue=100), "lm--v2": EngineConfig(max_batch=16, max_queue=10)}


def capacity(**http: Any) -> Capacity:
    return Capacity(HttpConfig(**http), TABLE, ENGINES)


def found(**replicas: int) -> dict[str, Replicas]:
    return {name.replace("_", "--"): Replicas(count, "AUTOSCALING") for name, count in replicas.items()}


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_room_grows_with_the_replicas_of_every_version() -> None:
    capacities = capacity(work_ahead=0.5, max_queue_tokens=1000)
    assert capacities.room("lm") == Room(running=36, waiting=110, tokens=1000)
    assert capacities.update(found(lm_v1=4, lm_v2=1, other_v1=1))
    assert capacities.room("lm") == Room(running=48 + 24, waiting=410, tokens=1000)
    assert not capacities.update(found(lm_v1=4, lm_v2=1, other_v1=1))


def test_a_model_without_replicas_is_given_what_starts_one() -> None:
    capacities = capacity(work_ahead=0)
    capacities.update(found(lm_v1=0, lm_v2=0))
    assert capacities.room("lm").running == 24
    assert capacities.room("other").running == EngineConfig().max_batch


def test_gateways_share() -> None:
    assert capacity(work_ahead=0.5, max_queue_tokens=1000, gateway_replicas=3).room("lm") == Room(12, 37, 334)


def test_with_keys_a_part_is_reserved_and_nothing_is_sent_ahead() -> None:
    assert capacity(keys_file="keys.yaml", max_queue_tokens=1000).room("lm") == Room(24, 110, 1000, reserved=6)
    assert capacity(keys_file="keys.yaml", reserve=0).room("lm").reserved == 0
    crowded = capacity(keys_file="keys.yaml", gateway_replicas=24, reserve=0.9).room("lm")
    assert (crowded.running, crowded.reserved) == (1, 0)


@pytest.mark.parametrize("trigger", ["UPSCALE_COMPLETED", SimpleNamespace(value="UPSCALE_COMPLETED")])
def test_replicas_and_why_they_changed_are_shown(trigger: Any) -> None:
    def status(replicas: int) -> Any:
        state = SimpleNamespace(replica_states={"RUNNING": replicas, "STARTING": 1}, status_trigger=trigger)
        return SimpleNamespace(applications={"lm--v1": SimpleNamespace(deployments={"lm--v1": state})})

    before = value("raymodels_serve_replica_changes_total", model="lm", reason="UPSCALE_COMPLETED") or 0
    capacities = capacity()
    for replicas in (2, 2, 3):
        capacities.update(deployments(status(replicas)))
    assert value("raymodels_serve_replicas", model="lm") == 3
    assert value("raymodels_serve_replica_changes_total", model="lm", reason="UPSCALE_COMPLETED") == before + 2
    assert value("raymodels_serve_replicas", model="other") == 0


def message(error: str) -> str:
    """Serve's, of a deployment none of whose replicas starts."""
    return (
        "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or initial "
        "health check failing. See controller logs for details. Error:\n"
        "ray::ServeReplica:lm--v1:lm--v1.initialize_and_get_metadata() (pid=7, ip=127.0.0.1, repr=<x>)\n"
        '  File "replica.py", line 1150, in initialize_and_get_metadata\n    raise RuntimeError(message) from None\n'
        f'RuntimeError: Traceback (most recent call last):\n  File "replica.py", line 99, in __init__\n{error}'
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("raymodels.errors.IntegrityError: a.safetensors was changed: fetch it", "a.safetensors was changed: fetch it"),
        ("torch.OutOfMemoryError: out of memory\nCompile with\n", "OutOfMemoryError: out of memory"),
        ("ValueError: no such dtype\n", "ValueError: no such dtype"),
    ],
)
def test_the_cause_is_what_was_raised_last(error: str, told: str) -> None:
    assert cause(message(error)) == told


def test_a_message_without_an_exception_is_the_cause_itself() -> None:
    assert cause("the update was stopped\n") == "the update was stopped"


def test_a_model_fails_once_none_of_its_replicas_starts() -> None:
    failed = Replicas(0, "REPLICA_STARTUP_FAILED", "the weights were changed")
    capacities = capacity()
    assert capacities.failure("lm") is None  # nothing is known yet
    capacities.update({"lm--v1": failed, "lm--v2": Replicas(1, "UPSCALE_COMPLETED")})
    assert capacities.failure("lm") is None
    capacities.update({"lm--v1": failed, "lm--v2": Replicas(0, "DOWNSCALE_COMPLETED")})
    assert (capacities.failure("lm"), capacities.failure("other")) == ("the weights were changed", None)
    capacities.update(found(lm_v1=0, lm_v2=0))
    assert capacities.failure("lm") is None


def test_a_failed_health_check_is_no_failure_to_load() -> None:
    """As of an only replica that was killed: its successor is on its way."""
    state = SimpleNamespace(replica_states={}, status_trigger="HEALTH_CHECK_FAILED", message="A health check failed.")
    status = SimpleNamespace(applications={"other--v1": SimpleNamespace(deployments={"other--v1": state})})
    assert deployments(status)["other--v1"] == Replicas(0, "HEALTH_CHECK_FAILED")
    state.status_trigger, state.message = "REPLICA_STARTUP_FAILED", message("raymodels.errors.ServeError: no room")
    assert deployments(status)["other--v1"].failure == "no room"


def test_however_many_look_serve_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def status() -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise ConnectionError("the controller restarts")
        return SimpleNamespace(applications={})

    monkeypatch.setattr(serve, "status", status)

    async def main() -> None:
        capacities = capacity()
        await asyncio.gather(*(capacities.look(60) for _ in range(20)))
        assert len(asked) == 1
        await capacities.look()
        assert len(asked) == 2
        capacities.update(found(lm_v1=3))
        assert not await capacities.look()  # which fails
        assert (len(asked), capacities.running("lm")) == (3, 3)

    asyncio.run(main())
