"""Encoding texts beside the event loop: what is refused before it is encoded, and that nothing large stops the loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from raymodels.config import EngineConfig, TenantConfig
from raymodels.registry import Registry
from raymodels.serve.encoding import SMALL, Answered, Lane
from raymodels.serve.engine import QueueFull
from raymodels.serve.one_each import MOST_WAITING, OneEach
from raymodels.serve.replica import Replica
from raymodels.serve.schema import (
    Problem,
    Refused,
    read_chat,
    read_completion,
    read_detokenize,
    read_embedding,
    read_tokenize,
)
from raymodels.serve.text import Text

LARGE = "qzxj " * 60_000  # 300,000 characters and more tokens than half of that
MODEL = {"model": "m"}


@pytest.fixture(scope="module")
def replica(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("m", str(tiny_model_dir), {})
    made = Replica(registry.place, "m@1", EngineConfig(max_batch=4), threads=1)
    yield made
    made._engine.close()


@asynccontextmanager
async def measured(busy: list[float]) -> AsyncIterator[None]:
    """Puts down the CPU seconds that this thread, the loop's, was busy for meanwhile."""
    before = time.thread_time()
    yield
    busy.append(time.thread_time() - before)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def main() -> tuple[Any, float]:
        busy: list[float] = []
        async with measured(busy):
            answer = await asyncio.wait_for(work, 60)
        return answer, busy[0]

    return asyncio.run(main())


async def first(replica: Replica, request: Any) -> Any:
    items = replica.generate(request)
    try:
        return await anext(items)
    finally:
        await items.aclose()  # type: ignore[attr-defined]


TOO_LONG: dict[str, tuple[Callable[[Replica], Coroutine[Any, Any, Any]], str]] = {
    "completion": (lambda r: first(r, read_completion(MODEL | {"prompt": LARGE})), "prompt"),
    "completions": (lambda r: first(r, read_completion(MODEL | {"prompt": ["x", LARGE]})), "prompt"),
    "ids": (lambda r: first(r, read_completion(MODEL | {"prompt": [1] * 300_000})), "prompt"),
    "embedding": (lambda r: r.embed(read_embedding(MODEL | {"input": ["x", LARGE]})), "input"),
    "check": (lambda r: r.check(read_completion(MODEL | {"prompt": [LARGE, "x"]})), "prompt"),
}


@pytest.mark.parametrize("kind", TOO_LONG)
def test_what_cannot_fit_is_refused_without_encoding_it(
    replica: Replica, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Text.encode
    monkeypatch.setattr(Text, "encode", lambda *given, **how: encoded.append(len(given[1])) or encode(*given, **how))
    work, field = TOO_LONG[kind]
    problem, busy = run(work(replica))
    assert isinstance(problem, Problem)
    assert (problem.status, problem.param, problem.code) == (400, field, "context_length_exceeded")
    assert "over the context of 256 tokens" in problem.message
    assert max(encoded, default=0) <= SMALL
    assert busy < 0.1


def test_where_the_size_says_nothing_pieces_are_counted_until_it_is_over(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count = Text.count
    monkeypatch.setattr(Text, "fewest", lambda *_: 0)  # as of a tokenizer one of whose tokens may be any text
    monkeypatch.setattr(Text, "count", lambda text, part: counted.append(len(part)) or count(text, part))
    problem, busy = run(first(replica, read_completion(MODEL | {"prompt": LARGE})))
    assert (problem.code, len(counted)) == ("context_length_exceeded", 1)
    assert busy < 0.1


@pytest.mark.parametrize("names", [False, True])
def test_a_large_text_is_tokenized_beside_the_loop(replica: Replica, names: bool) -> None:
    request = read_tokenize(MODEL | {"prompt": LARGE, "return_token_strs": names})
    start = time.process_time()
    found, busy = run(replica.tokenize(request))
    spent = time.process_time() - start
    assert isinstance(found, Answered)
    answer = json.loads(found.body)
    assert answer["tokens"] == replica._engine.text.encode(LARGE)
    assert answer["count"] == len(answer["tokens"]) == found.tokens
    assert answer["max_model_len"] == 256
    if names:
        assert "".join(answer["token_strs"]).replace("\u0120", " ") == LARGE
    assert busy < spent / 4  # the loop's thread did little of it


def test_many_tokens_become_text_beside_the_loop(replica: Replica) -> None:
    tokens = replica._engine.text.encode(LARGE)
    start = time.process_time()
    found, busy = run(replica.detokenize(read_detokenize(MODEL | {"tokens": tokens})))
    spent = time.process_time() - start
    assert (json.loads(found.body), found.tokens) == ({"prompt": LARGE}, len(tokens))
    assert busy < spent / 2


def test_a_large_conversation_is_made_a_prompt_beside_the_loop(
    tiny_model_dir: Path, tmp_path: Path, replica: Replica
) -> None:
    threads: list[str] = []

    class Watched(type(replica._translator)):  # type: ignore[misc]
        def _chat(self, *given: Any) -> str:
            threads.append(threading.current_thread().name)
            return "hello"

    translator = replica._translator
    watched = Watched(translator.text, translator.encoder, "m@1", translator.context, translator.max_choices)
    for messages in (1, 1000):
        body = MODEL | {"messages": [{"role": "user", "content": "x"}] * messages}
        run(watched.parts(read_chat(body), None))
    assert threads[0] == "MainThread"
    assert threads[1].startswith("prompts")


def test_a_lane_refuses_more_than_may_wait() -> None:
    async def main() -> list[Any]:
        lane = Lane("test", 2)
        return await asyncio.gather(*(lane.run(time.sleep, 0.01) for _ in range(3)), return_exceptions=True)

    *done, refused = asyncio.run(main())
    assert done == [None, None]
    assert isinstance(refused, QueueFull)


def test_one_tenants_large_texts_take_one_turn_among_others() -> None:
    async def main() -> list[str]:
        turns, order = OneEach(), list[str]()

        async def one(name: str, size: int = 100_000) -> None:
            async with turns.turn(TenantConfig(name=name, keys=()), size, 1e12):
                order.append(name)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(one("loud") for _ in range(3)), one("quiet"), one("loud", 100))
        results = await asyncio.gather(*(one("loud") for _ in range(MOST_WAITING + 2)), return_exceptions=True)
        assert [result.problem.status for result in results if isinstance(result, Refused)] == [429]
        return order[:5]

    assert asyncio.run(main()) == ["loud", "quiet", "loud", "loud", "loud"]
