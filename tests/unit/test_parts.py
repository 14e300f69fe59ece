"""Requests computed in parts: what each part asks for, and that together they are the whole."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from raymodels.config import EngineConfig, TenantConfig
from raymodels.serve.admission import Admission, Turn
from raymodels.serve.engine import Delta
from raymodels.serve.fair_queue import Room
from raymodels.serve.parts import PartedCall, check_size, cut, in_parts, sent
from raymodels.serve.quotas import Quotas, sequences
from raymodels.serve.replica import Accepted
from raymodels.serve.routing import Call
from raymodels.serve.schema import Problem, Refused, Request, read_chat, read_completion, read_embedding
from tests.unit.endpoint import LocalStream

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def completion(**fields: Any) -> Any:
    return read_completion({"model": "m", **fields})


def wanted(request: Any) -> list[tuple[Any, Any]]:
    """Of each sequence of a request, in order: what it is made of."""
    if hasattr(request, "inputs"):
        return [(text, None) for text in request.inputs]
    prompts = getattr(request, "prompts", ["chat"])
    seed = request.seed
    return [(prompt, None if seed is None else seed + c) for prompt in prompts for c in range(request.n)]


REQUESTS = [
    completion(prompt=["a", "b", "c"], n=4, seed=7),
    completion(prompt="a", n=9, seed=2**63 - 2),
    completion(prompt=[1, 2, 3], n=3),
    completion(prompt=[[1, 2], [3]], n=3),
    read_chat(CHAT | {"n": 17, "seed": -3}),
    read_embedding({"model": "m", "input": [f"text {n}" for n in range(25)]}),
    read_embedding({"model": "m", "input": [1, 2, 3]}),
    read_embedding({"model": "m", "input": [[1], [2, 3]]}),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_however_a_request_is_cut_its_parts_are_the_whole(request_: Any) -> None:
    draw = random.Random(3)
    for _ in range(50):
        found, begin, most = list[Any](), 0, draw.choice([1, 3, 30])
        while begin < sequences(request_):
            places = draw.randint(1, most)
            part, size = cut(request_, begin, places)
            assert 1 <= size <= places
            assert sequences(part) == size
            found += wanted(part)
            begin += size
        assert found == wanted(request_)


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        (CHAT | {"n": 5}, "n", "n 5 is over the 4 choices decoded at once"),
        ({"model": "m", "prompt": "x", "n": 5}, "n", "n 5 is over the 4 choices decoded at once"),
        ({"model": "m", "prompt": ["x"] * 4, "n": 3}, "prompt", "4 prompts with n 3 are over the 10 choices held at"),
        ({"model": "m", "input": ["x"] * 11}, "input", "11 inputs are over the 10 held at once"),
    ],
)
def test_what_can_never_be_held_is_refused_with_the_limit(body: Any, field: str, told: str) -> None:
    read = read_chat if "messages" in body else read_embedding if "input" in body else read_completion
    with pytest.raises(Refused, match=told) as refused:
        check_size(read(body), EngineConfig(max_batch=4, max_queue=6))
    assert (refused.value.problem.status, refused.value.problem.param) == (400, field)
    check_size(read(body), EngineConfig(max_batch=5, max_queue=8))


def answered(request: Request, use: Callable[[Any], Any], fails: int | None = None, places: int = 2) -> Any:
    """What comes of a request that gets so many places at a time; the part with sequence ``fails`` is refused."""
    parts = list[int]()

    async def answer(part: Any, begin: int) -> AsyncGenerator[Any, None]:
        yield Accepted(10)
        if fails is not None and begin <= fails < begin + sequences(part):
            raise ValueError("the cause")
        for step in (1, 2):
            await asyncio.sleep(0)
            ends = "length" if step == 2 else None
            yield [Delta(c, f"{seed}/{step} ", step, finish=ends) for c, (_, seed) in enumerate(wanted(part))]

    async def send(part: Request) -> Call:
        begin = sum(parts)
        parts.append(sequences(part))
        call = Call(lambda: LocalStream(answer(part, begin)), asyncio.get_running_loop().time() + 60)
        await call.accept()
        return call

    async def check() -> int:
        return 50

    async def main() -> Any:
        door = Admission(lambda _: Room(places, 100, 10**6), Quotas())
        far, who = asyncio.get_running_loop().time() + 60, TenantConfig(name="a", keys=())
        async with door.slot(who, "m", 100, sequences(request), far) as turn:
            call = await sent(request, turn, send, check)
            found = await use(call)
            return found, call.usage.prompt_tokens, call.usage.completion_tokens, max(parts)

    return asyncio.run(main())


async def whole(call: PartedCall) -> dict[int, str]:
    seen = list[Delta]()
    return _texts(await call.whole(seen.extend)) | ({} if seen else {-1: "nobody was told"})


async def streamed(call: PartedCall) -> dict[int, str]:
    return _texts([delta async for deltas in call.deltas() for delta in deltas])


def _texts(deltas: list[Delta]) -> dict[int, str]:
    found = dict[int, str]()
    for delta in deltas:
        found[delta.choice] = found.get(delta.choice, "") + delta.text
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("places", [1, 2, 3, 5])
def test_choices_of_parts_are_numbered_through(stream: bool, places: int) -> None:
    use = streamed if stream else whole
    request = completion(prompt="a", n=7, seed=100, stream=stream)
    expected = {c: f"{100 + c}/1 {100 + c}/2 " for c in range(7)}
    assert answered(request, use, places=places) == (expected, 10, 14, places)
    several = completion(prompt=["a", "b", "c"], n=2, seed=100, stream=stream)
    expected = {c: f"{100 + c % 2}/1 {100 + c % 2}/2 " for c in range(6)}
    assert answered(several, use, places=places)[:3] == (expected, 50, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_a_part_that_fails_ends_the_whole(stream: bool) -> None:
    request = completion(prompt="a", n=7, stream=stream)
    with pytest.raises(Refused) as refused:
        answered(request, streamed if stream else whole, fails=5)
    assert refused.value.problem.code == "replica_failed"


def test_a_first_part_that_is_refused_refuses_the_request() -> None:
    async def main() -> None:
        async def send(part: Request) -> Call:
            raise Refused(Problem(status=400, message="no"))

        async def check() -> int:
            return 1

        door, who = Admission(lambda _: Room(2, 100, 10**6), Quotas()), TenantConfig(name="a", keys=())
        with pytest.raises(Refused, match="no"):
            async with door.slot(who, "m", 100, 5, asyncio.get_running_loop().time() + 60) as turn:
                await sent(completion(prompt="x", n=5, stream=True), turn, send, check)
        assert door.queue("m").idle

    asyncio.run(main())


def test_leaving_gives_up_every_part() -> None:
    gone = list[int]()

    async def main() -> None:
        async def compute(part: Any, begin: int) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                gone.append(begin)

        async def ask() -> None:
            async with door.slot(who, "m", 100, 9, far) as turn:
                assert isinstance(turn, Turn)
                await in_parts(completion(prompt="x", n=9), turn, compute)

        door, who = Admission(lambda _: Room(4, 100, 10**6), Quotas()), TenantConfig(name="a", keys=())
        far = asyncio.get_running_loop().time() + 60
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.01)
        assert door.queue("m").running_sequences == 4
        asking.cancel()
        await asyncio.wait([asking])
        assert door.queue("m").idle

    asyncio.run(main())
    assert gone == [0]
