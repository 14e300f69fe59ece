"""Two gateways behind Serve's proxy: either shows the figures of both, and answers alone when the other is killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from raymodels.config import ServeConfig, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, deploy

ANSWERED = re.compile(
    r'^raymodels_serve_requests_total\{gateway="(\w+)",.*route="completions",status="200".*\} (\S+)$', re.M
)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("twice", str(tiny_model_dir), {})
    http = {"port": 0, "ingress": "proxy", "gateway_replicas": 2}
    models = [{"model": "twice", "cpus": 0.5}]
    with deploy(validate({"registry": registry.place, "models": models, "http": http}, ServeConfig)) as endpoint:
        yield endpoint


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


def complete(http: httpx.Client, number: int) -> list[int]:
    """The statuses of so many completions, four at a time."""

    def one(_: int) -> int:
        return http.post("/v1/completions", json={"model": "twice", "prompt": "the", "max_tokens": 4}).status_code

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(number)))


def answered(http: httpx.Client) -> dict[str, float]:
    """The completions that each gateway has answered, as the page shows them, whoever gives it."""
    page = http.get("/metrics")
    assert page.status_code == 200
    found: Counter[str] = Counter()
    for gateway, number in ANSWERED.findall(page.text):
        found[gateway] += float(number)
    return found


def gateways() -> set[int]:
    """Their processes."""
    from ray import serve

    asked = serve.get_app_handle("gateway").broadcast("process")
    answers = asked.results(timeout_s=30, return_exceptions=True)
    return {answer.pid for answer in answers if not isinstance(answer, Exception)}  # one may have just died


def until_both_answer(http: httpx.Client) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while len(found := answered(http)) < 2:
        assert time.monotonic() < deadline, found
        assert complete(http, 4) == [200] * 4
    return found


def test_either_shows_the_figures_of_both(http: httpx.Client) -> None:
    until_both_answer(http)
    before = answered(http)
    assert complete(http, 20) == [200] * 20
    pages = [answered(http) for _ in range(8)]
    assert pages == [pages[0]] * 8
    assert pages[0].keys() == before.keys()
    assert sum(pages[0].values()) == sum(before.values()) + 20


def test_one_answers_when_the_other_is_killed(http: httpx.Client) -> None:
    before = until_both_answer(http)
    victim, survivor = sorted(gateways())
    os.kill(victim, signal.SIGKILL)
    assert complete(http, 20) == [200] * 20
    after = answered(http)
    [name] = after.keys() & before.keys()
    assert after[name] > before[name]
    deadline = time.monotonic() + 60
    while len(now := gateways()) < 2:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    assert survivor in now
    assert len(until_both_answer(http).keys() & before.keys()) == 1
