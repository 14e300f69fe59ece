"""What clients see when a replica dies and when the table changes, on a real endpoint with two replicas."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from raymodels.config import ServeConfig, validate
from raymodels.errors import ServeError
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, deploy

# No end-of-text token: every answer is as long as was asked for.
FIELDS = {"model": "tiny", "prompt": "the model reads", "logit_bias": {"0": -100}}


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("tiny", str(tiny_model_dir), {})
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    model = {"model": "tiny", "cpus": 0.5, "autoscaling": {"min_replicas": 2, "max_replicas": 2}}
    http = {"port": port, "ingress": "direct", "access_log": False}
    return {"registry": registry.place, "models": [model], "http": http}


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Any, config: dict[str, Any]) -> Iterator[Endpoint]:
    with deploy(validate(config, ServeConfig)) as endpoint:
        yield endpoint


def ask_a_replica(method: str) -> Any:
    from ray import serve

    return getattr(serve.get_app_handle("tiny--v1"), method).remote().result(timeout_s=60)


def pids() -> set[int]:
    return {ask_a_replica("process").pid for _ in range(20)}


async def ask(http: httpx.AsyncClient, stream: bool) -> tuple[bool, int, str]:
    """Whether it was streamed, its status, its text."""
    answer = await http.post("/v1/completions", json={**FIELDS, "max_tokens": 150, "stream": stream})
    return stream, answer.status_code, answer.text


@contextmanager
def waiting(endpoint: Endpoint) -> Iterator[Future[None]]:
    """As `raymodels serve` does, in a thread, until an application of the endpoint is found to be deleted."""
    watched = replace(endpoint, applications=[*endpoint.applications])
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(watched.wait)
        try:
            yield ended
        finally:
            watched.applications.append("gone--v1")
            with pytest.raises(ServeError, match="gone--v1 of this endpoint was deleted"):
                ended.result(30)


def until_logged(text: str, caplog: pytest.LogCaptureFixture, ended: Future[None]) -> None:
    deadline = time.monotonic() + 90
    while text not in caplog.text:
        assert not ended.done() and time.monotonic() < deadline, caplog.text
        time.sleep(0.1)


def test_a_replica_killed_under_load_loses_no_request_and_ends_nothing(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raymodels.serve.deploy.WATCH_S", 0.1)
    victim = next(iter(pids()))

    async def main() -> list[tuple[bool, int, str]]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:
            first = [asyncio.create_task(ask(http, stream)) for stream in (True, False) * 6]
            while not ((await asyncio.to_thread(ask_a_replica, "stats")).running or all(task.done() for task in first)):
                pass
            os.kill(victim, signal.SIGKILL)
            later = [asyncio.create_task(ask(http, stream)) for stream in (True, False) * 3]
            return await asyncio.gather(*first, *later)

    with waiting(endpoint) as ended:
        answers = asyncio.run(main())
        until_logged("UNHEALTHY", caplog, ended)
        until_logged("tiny--v1: running again", caplog, ended)
    assert {status for _, status, _ in answers} == {200}
    events = [text for stream, _, text in answers if stream]
    assert all(text.endswith("data: [DONE]\n\n") or '"code":"replica_lost"' in text for text in events)
    assert all('"finish_reason"' in text for stream, _, text in answers if not stream)
    assert victim not in pids()


def test_a_new_table_disturbs_nobody(endpoint: Endpoint, config: dict[str, Any]) -> None:
    from ray import serve

    def gateway() -> int:
        return int(serve.get_app_handle("gateway").process.remote().result().pid)

    before, second = gateway(), {**config["models"][0], "served_as": "second"}
    with httpx.Client(base_url=endpoint.url, timeout=60) as http:
        body = {**FIELDS, "max_tokens": 4}
        assert http.post("/v1/completions", json={**body, "model": "second"}).status_code == 404
        again = deploy(validate({**config, "models": [*config["models"], second]}, ServeConfig))
        assert (again.url, gateway()) == (endpoint.url, before)
        for model in ("tiny", "second"):
            assert http.post("/v1/completions", json={**body, "model": model}).status_code == 200


def test_a_model_that_does_not_load_says_why_and_leaves_others_unharmed(
    endpoint: Endpoint, config: dict[str, Any], tiny_model_dir: Path
) -> None:
    version = Registry(config["registry"]).publish("asleep", str(tiny_model_dir), {})
    asleep = {"model": "asleep", "cpus": 0.5, "autoscaling": {"min_replicas": 0, "max_replicas": 1}}
    deploy(validate({**config, "models": [*config["models"], asleep]}, ServeConfig))
    weights = Path(version.model_place) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    body = {**FIELDS, "max_tokens": 4}
    with httpx.Client(base_url=endpoint.url, timeout=60) as http:
        assert http.get("/v1/models/asleep").json()["root"] is None
        headers = {"X-Request-Timeout": "5"}
        assert http.post("/v1/completions", json={**body, "model": "asleep"}, headers=headers).status_code == 503
        deadline = time.monotonic() + 120
        while (answer := http.get("/v1/models/asleep")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (503, "model_not_loading")
        assert "model.safetensors was changed" in told["message"]
        assert "Traceback" not in told["message"]
        again = http.post("/v1/completions", json={**body, "model": "asleep"})
        assert (again.status_code, again.json()["error"]["message"]) == (503, told["message"])
        assert http.post("/v1/completions", json=body).status_code == 200
        listed = {each["id"]: each["root"] for each in http.get("/v1/models").json()["data"]}
        assert listed == {"tiny": "tiny@1", "asleep": None}
