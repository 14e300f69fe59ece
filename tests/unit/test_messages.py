"""The size of messages between gateway and replica: one setting gives it to both, and long answers keep to it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from raymodels.config import HttpConfig
from raymodels.serve import deploy
from raymodels.serve.engine import Alternative, Delta, Token
from raymodels.serve.replica import portions
from raymodels.serve.schema import read_chat, read_completion


@pytest.mark.parametrize(("body", "message"), [(1000, 64 << 20), (8 << 20, 256 << 20), (1 << 30, 2**31 - 1)])
def test_the_gateway_is_started_for_messages_of_32_bodies(body: int, message: int) -> None:
    options = deploy._gateway(HttpConfig(max_body_bytes=body), {}, {}).ray_actor_options
    assert options["runtime_env"]["env_vars"][deploy.MESSAGE_BYTES] == str(message)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_chat, {"messages": [{"role": "user", "content": "a"}] * 20_000}),
        (read_chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]}),
        (read_completion, {"prompt": [7] * 50_000}),
        (read_completion, {"prompt": ["a"] * 50_000}),
        (read_completion, {"prompt": "é" * 50_000}),
    ],
)
def test_a_request_is_hardly_larger_than_its_body(read: Any, body: dict[str, Any]) -> None:
    size = len(json.dumps(body, separators=(",", ":")).encode())
    assert len(pickle.dumps(read({"model": "m"} | body))) < 2 * size + 2000


def test_long_answers_go_in_portions() -> None:
    top = tuple(Alternative(id, b"abc", -1.5) for id in range(20))
    tokens = tuple(Token(id, b"abc", -1.5, id, top) for id in range(1000))
    deltas = [Delta(choice, "text", 1000, tokens) for choice in range(32)]
    found = list(portions(deltas))
    assert [delta for portion in found for delta in portion] == deltas
    assert 8 <= len(found) <= 16
    assert max(len(pickle.dumps(portion)) for portion in found) < 4 << 20
    assert list(portions([])) == []
