"""The size of messages between gateway and replica: one setting gives it to both, and long answers keep to it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from raymodels.config import HttpConfig
from raymodels.serve import deploy
from raymodels.serve.schema import read_chat, read_completion


@pytest.mark.parametrize(("body", "message"), [(1000, 64 << 20), (8 << 20, 256 << 20), (1 << 30, 2**31 - 1)])
def test_the_gateway_is_started_for_messages_of_32_bodies(body: int, message: int) -> None:
    options = deploy._gateway(HttpConfig(max_body_bytes=body), {}, {}).ray_actor_options
    assert options["runtime_env"]["env_vars"][deploy.MESSAGE_BYTES] == str(message)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_chat, {"messages": [{"role": "user", "content": "a"}] * 4_000}),
        (read_chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]}),
        (read_completion, {"prompt": [7] * 50_000}),
        (read_completion, {"prompt": ["a"] * 16_000}),
        (read_completion, {"prompt": "é" * 50_000}),
    ],
)
def test_a_request_is_hardly_larger_than_its_body(read: Any, body: dict[str, Any]) -> None:
    size = len(json.dumps(body, separators=(",", ":")).encode())
    assert len(pickle.dumps(read({"model": "m"} | body))) < 2 * size + 2000
