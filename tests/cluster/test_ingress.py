"""Ray Serve's own proxy in front of a gateway: the bounds of its connections, and of messages behind it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from raymodels.config import HttpConfig, ServeConfig, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, deploy

WORDS = "the model reads " * 270_000
"""4.3 MB: more than gRPC takes by itself."""


@pytest.fixture(scope="module")
def registry(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("tiny", str(tiny_model_dir), {})
    return registry


def config(registry: Registry) -> ServeConfig:
    http, model = {"port": 0, "ingress": "proxy"}, {"model": "tiny", "cpus": 0.5}
    return validate({"registry": registry.place, "models": [model], "http": http}, ServeConfig)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Any, registry: Registry) -> Iterator[Endpoint]:
    with deploy(config(registry)) as endpoint:
        yield endpoint


def said(endpoint: Endpoint, request: bytes) -> bytes:
    """What is answered to a client that has ended its side of the connection."""
    place, answer = urlsplit(endpoint.url), b""
    with socket.create_connection((str(place.hostname), place.port or 0), timeout=60) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        while piece := client.recv(65536):
            answer += piece
    return answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


def test_serves_proxies_have_bounded_connections(endpoint: Endpoint) -> None:
    assert said(endpoint, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert said(endpoint, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200).startswith(b"HTTP/1.1 431 ")
    assert said(endpoint, b"GET /" + b"x" * 20_000).startswith(b"HTTP/1.1 414 ")


def test_what_a_body_may_hold_also_comes_to_the_replica_and_back(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=120) as http:
        long = http.post("/v1/completions", json={"model": "tiny", "prompt": WORDS})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        tokens = http.post("/tokenize", json={"model": "tiny", "prompt": "Ω" * 200_000, "return_token_strs": True})
        assert tokens.status_code == 200
        assert len(tokens.content) > 4 << 20


def test_what_is_larger_than_a_message_is_said_to_be(
    endpoint: Endpoint, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpConfig, "message_bytes", 100_000)
    deploy(config(registry))
    with httpx.Client(base_url=endpoint.url, timeout=120) as http:
        sent = http.post("/v1/completions", json={"model": "tiny", "prompt": WORDS[:200_000]})
        assert (sent.status_code, sent.json()["error"]["code"]) == (413, "body_too_large")
        asked = {"model": "tiny", "prompt": WORDS[:60_000], "return_token_strs": True}
        got = http.post("/tokenize", json=asked)
        assert (got.status_code, got.json()["error"]["code"]) == (500, "answer_too_large")
