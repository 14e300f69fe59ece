"""The room that replicas make, and what is shown of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.admission import Room
from raymodels.serve.capacity import Capacity, deployments
from raymodels.serve.routing import Route

TABLE = {"lm": Route({"lm--v1": 0.9, "lm--v2": 0.1}), "other": Route({"other--v1": 1.0})}
ENGINES = {"lm--v1": EngineConfig(max_batch=8, max_queue=100), "lm--v2": EngineConfig(max_batch=16, max_queue=10)}


def capacity(**http: Any) -> Capacity:
    return Capacity(HttpConfig(**http), TABLE, ENGINES)


def found(**replicas: int) -> dict[str, tuple[int, str]]:
    return {name.replace("_", "--"): (count, "AUTOSCALING") for name, count in replicas.items()}


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
