"""Another table for a gateway under load: no restart, no stream cut, in both ways of deploying."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from raymodels.config import ServeConfig, to_yaml, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import deploy

ENGINE = {"max_batch": 1, "max_queue": 32}
BODY = {"prompt": "the", "max_tokens": 40, "logit_bias": {"0": -100}}


@pytest.fixture(scope="module")
def registry(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    for _ in range(2):
        registry.publish("changing", str(tiny_model_dir), {})
    return registry


def config(registry: Registry, *models: dict[str, Any]) -> ServeConfig:
    served = [{"cpus": 0.5, "engine": ENGINE, **model} for model in models]
    http = {"port": 0, "work_ahead": 0}
    return validate({"registry": registry.place, "models": served, "http": http}, ServeConfig)


class Load:
    """Clients that ask for some names all the time, streamed and not; how they were answered."""

    def __init__(self, url: str, names: str) -> None:
        self.found: Counter[tuple[str, int, str]] = Counter()
        self._url, self._over = url, threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(name, stream)) for name in names for stream in (True, False) * 2
        ]

    def _ask(self, name: str, stream: bool) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                answer = client.post("/v1/completions", json={"model": name, "stream": stream, **BODY})
                whole = answer.text.endswith("data: [DONE]\n\n") if stream else "choices" in answer.json()
                how = "whole" if whole else answer.json()["error"]["code"] if not stream else answer.text[-200:]
                if answer.status_code == 404:
                    how = answer.json()["error"]["code"]
                    time.sleep(0.05)
                self.found[name, answer.status_code, how] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def seen(self, name: str, status: int) -> None:
        """Wait until a name has been answered so, from now on."""
        how = "whole" if status == 200 else "model_not_found"
        before, deadline = self.found[name, status, how], time.monotonic() + 120
        while self.found[name, status, how] < before + 2:
            assert time.monotonic() < deadline, (name, status, self.found)
            time.sleep(0.05)


def gateway_pid(application: str) -> int:
    from ray import serve

    return int(serve.get_deployment_handle("gateway", application).process.remote().result(timeout_s=30).pid)


def test_names_come_and_go_under_load(ray_cluster: Any, registry: Registry) -> None:
    one, two = {"model": "changing@1"}, {"model": "changing@2"}
    both = config(registry, {**one, "served_as": "a"}, {**two, "served_as": "b"})
    with deploy(both) as endpoint, Load(endpoint.url, "abc") as load:
        port = int(endpoint.url.rpartition(":")[2])
        pid = gateway_pid("gateway")
        for before, models, there, gone in (
            ("ab", [{**two, "served_as": "b"}], "b", "ac"),  # removed, while requests for it wait
            ("b", [{**two, "served_as": "c"}], "c", "ab"),  # renamed
            ("c", [{**one, "served_as": "a"}, {**one, "served_as": "c"}], "ac", "b"),  # added, and pointed elsewhere
        ):
            for name in before:
                load.seen(name, 200)
            changed = config(registry, *models)
            deploy(changed.model_copy(update={"http": both.http.model_copy(update={"port": port})}))
            for name in there:
                load.seen(name, 200)
            for name in gone:
                load.seen(name, 404)
        assert gateway_pid("gateway") == pid
        names = {model["id"] for model in httpx.get(f"{endpoint.url}/v1/models").json()["data"]}
        assert names == {"a", "c"}
    assert {(status, how) for _, status, how in load.found} == {(200, "whole"), (404, "model_not_found")}


@contextmanager
def kuberay(*applications: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A Serve that is told what to run as KubeRay's operator does; gives its URL, and what tells it anew."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def put(*applications: dict[str, Any]) -> None:
        told = ServeDeploySchema.model_validate({"applications": list(applications)})
        serve.context._get_global_client().deploy_apps(told, _blocking=False)
        deadline = time.monotonic() + 180
        while {app["name"]: "RUNNING" for app in applications} != {
            name: about.status for name, about in serve.status().applications.items()
        }:
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.2)

    try:
        put(*applications)
        yield f"http://127.0.0.1:{port}", put
    finally:
        serve.shutdown()


def test_under_kuberay_a_table_changes_without_a_restart(ray_cluster: Any, registry: Registry, tmp_path: Path) -> None:
    for name, version in (("serve", "changing@1"), ("next", "changing@2")):
        served = config(registry, {"model": version, "served_as": "a"})
        (tmp_path / f"{name}.yaml").write_text(to_yaml(served))
    main = {
        "name": "raymodels",
        "import_path": "raymodels.serve.deploy:application",
        "route_prefix": "/",
        "args": {"config": str(tmp_path / "serve.yaml")},
    }
    following = {
        "name": "next",
        "import_path": "raymodels.serve.deploy:version",
        "route_prefix": None,
        "args": {"config": str(tmp_path / "next.yaml"), "model": "a"},
    }

    def led(**table: str) -> dict[str, Any]:
        routes = {name: {"applications": {to: 1}} for name, to in table.items()}
        return main | {
            "deployments": [{"name": "gateway", "user_config": {"table": routes, "engines": {"next": ENGINE}}}]
        }

    with kuberay(main) as (url, put), Load(url, "ab") as load:
        load.seen("a", 200)
        pid = gateway_pid("raymodels")
        put(led(a="changing--v1", b="changing--v1"))
        load.seen("b", 200)
        put(led(a="changing--v1"), following)
        load.seen("b", 404)
        put(led(a="next"), following)
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/v1/models/a").json()["root"] != "changing@2":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        load.seen("a", 200)
        assert gateway_pid("raymodels") == pid
    assert {(status, how) for _, status, how in load.found} == {(200, "whole"), (404, "model_not_found")}
