"""The pages that Prometheus scrapes have what the dashboards and alerts of k8s/ ask for, label for label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raymodels.config import ServeConfig, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, deploy
from raymodels.serve.tenants import add_key
from raymodels.train import gauges
from raymodels.train.events import Events
from tests.unit.promql import Metric, faults, questions, selectors

PATIENCE_SECONDS = 90.0  # Ray exports every 10 s, and the policy has to decide something first
# What a machine without GPUs, an endpoint whose replicas are healthy, and Ray outside of Kubernetes do not show.
NOT_HERE = ("ray_node_gpu", "ray_serve_health_check_failures_total", "autoscaler_")
ADDED = frozenset({"app_kubernetes_io_component", "ray_io_cluster", "pod"})  # by the PodMonitors


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A keys file, and the key in it."""
    file = str(tmp_path_factory.mktemp("keys") / "keys.yaml")
    return file, add_key(file, "alice", metrics=True)


@pytest.fixture(scope="module")
def endpoint(
    ray_cluster: Any, key: tuple[str, str], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("seen", str(tiny_model_dir), {})
    scaling = {"max_replicas": 2, "target_ongoing_requests": 0.5, "upscale_delay_s": 0}
    model = {"model": "seen", "cpus": 0.5, "autoscaling": scaling}
    http = {"port": 0, "keys_file": key[0]}
    with deploy(validate({"registry": registry.place, "models": [model], "http": http}, ServeConfig)) as endpoint:
        yield endpoint


def asked(prefix: str) -> set[str]:
    """The metrics of that prefix that some question is about."""
    names = {selector.name for question in questions() for selector in selectors(question.expression)}
    found = {name for name in names if name.startswith(prefix) and not name.startswith(NOT_HERE)}
    assert found
    return found


def shown(text: str) -> dict[str, Metric]:
    """The metrics on a page, with what the PodMonitors add to their labels."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kind = "gauge" if family.type == "gauge" else "bucket" if sample.name.endswith("_bucket") else "counter"
            known = found.get(sample.name, Metric(kind, ADDED)).labels
            found[sample.name] = Metric(kind, known | sample.labels.keys())
    return found


def until_all(names: set[str], page: Callable[[], str], between: Callable[[], object]) -> dict[str, Metric]:
    """What the page shows once all of the names are there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        between()
        found = shown(page())
        missing = names - found.keys()
        if not missing:
            return found
        assert time.monotonic() < deadline, f"not on the page: {sorted(missing)}"


def assert_answered(found: dict[str, Metric]) -> None:
    """No question about these metrics alone names a label that is not there, or takes one for another type."""
    about = [q for q in questions() if {selector.name for selector in selectors(q.expression)} <= found.keys()]
    assert about
    assert [fault for question in about for fault in faults(question, found)] == []


def rays_page(ray_cluster: Any) -> str:
    [node] = ray_cluster.nodes()
    return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text


def test_an_endpoints_figures(ray_cluster: Any, endpoint: Endpoint, key: tuple[str, str]) -> None:
    with httpx.Client(base_url=endpoint.url, headers={"Authorization": f"Bearer {key[1]}"}, timeout=60) as client:
        body = {"model": "seen", "prompt": "the", "max_tokens": 8}

        def complete(_: int) -> None:
            assert client.post("/v1/completions", json=body).status_code == 200

        def load() -> None:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(complete, range(16)))

        assert client.post("/v1/completions", json=body | {"temperature": -1}).status_code == 400
        gateway = until_all(asked("raymodels_serve_"), lambda: client.get("/metrics").text, load)
        assert httpx.get(f"{endpoint.url}/metrics").status_code == 401
        node = until_all(
            asked("ray_raymodels_serve_") | asked("ray_serve_") | asked("ray_node_"),
            lambda: rays_page(ray_cluster),
            load,
        )
    assert_answered(gateway | node)


def test_a_runs_figures(ray_cluster: Any, tmp_path: Path) -> None:
    report = {"step": 5, "world_size": 1, "memory_bytes": [5], "seconds": {"step": 1.0}}
    with Events(str(tmp_path / "seen"), None) as events:
        events({"kind": "started", "attempt": 1, "resumed_from_step": 0, "steps": 9})

        def reported() -> None:
            events({"kind": "report", **report, **dict.fromkeys(gauges.FIGURES, 1.0)})
            time.sleep(1)

        found = until_all(asked("ray_raymodels_train_"), lambda: rays_page(ray_cluster), reported)
    assert_answered(found)
