"""When a replica sends what its engine has: the first token at once, later ones in pieces of fair size."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from itertools import pairwise

import pytest

from raymodels.serve.answers import joined
from raymodels.serve.engine import Alternative, Delta, Token
from raymodels.serve.pace import LONGEST_S, Pace
from raymodels.serve.portions import PORTION, portions
from raymodels.serve.replica import _merged


def test_streams_share_the_pieces() -> None:
    pace = Pace(pieces_per_s=50)
    with pace.answer(True) as one, pace.answer(False) as whole:
        assert one() == 1 / 50
        with pace.answer(True) as other:
            assert one() == other() == 2 / 50
        assert one() == 1 / 50
        assert whole() == math.inf
    with pace.answer(True) as gap_s:
        assert gap_s() == 1 / 50


def test_no_stream_waits_longer_than_people_do() -> None:
    """Seen on two cores: 32 streams shared 12 pieces a second, so that they came 2.7 s apart."""
    pace = Pace(pieces_per_s=12)
    with ExitStack() as stack:
        gaps = [stack.enter_context(pace.answer(True)) for _ in range(32)]
        assert all(gap_s() == LONGEST_S == 0.2 for gap_s in gaps)


async def tokens(count: int, fails: bool = False) -> AsyncIterator[Delta]:
    for number in range(1, count + 1):
        yield Delta(0, "a", number)
        await asyncio.sleep(0.01)
    if fails:
        raise ValueError("the engine's")


async def pieces(gap_s: float, *streams: AsyncIterator[Delta]) -> list[int]:
    """How many deltas each piece holds."""
    async with asyncio.timeout(10):
        return [len(deltas) async for deltas in _merged(list(streams), lambda: gap_s)]


def test_the_first_token_never_waits() -> None:
    assert asyncio.run(pieces(0, tokens(20)))[0] == 1
    for gap_s in (60, math.inf):  # the rest comes as soon as all has ended, not at the end of the gap
        assert asyncio.run(pieces(gap_s, tokens(20))) == [1, 19]
    begin = time.monotonic()
    some = asyncio.run(pieces(0.05, tokens(20)))
    seconds = time.monotonic() - begin
    assert some[0] == 1
    assert sum(some) == 20
    assert 3 <= len(some) <= 2 + seconds / 0.05


async def in_steps(count: int, step_s: float, start: float) -> AsyncIterator[Delta]:
    for number in range(1, count + 1):
        await asyncio.sleep(max(0.0, start + number * step_s - time.monotonic()))
        yield Delta(0, "a", number)


@pytest.mark.parametrize(("step_s", "longest_s"), [(0.03, 0.12), (0.15, 0.15)])
def test_pieces_leave_as_a_step_ends_a_gap_after_those_before_them(step_s: float, longest_s: float) -> None:
    async def times(start: float) -> list[float]:
        merged = _merged([in_steps(round(1.2 / step_s), step_s, start)], lambda: 0.1)
        return [time.monotonic() - start async for _ in merged]

    async def together() -> list[list[float]]:
        start = time.monotonic()
        return list(await asyncio.gather(*(times(start) for _ in range(8))))

    for found in asyncio.run(together()):
        gaps = [after - before for before, after in pairwise(found)]
        assert statistics.median(gaps) == pytest.approx(longest_s, abs=0.03)


def test_a_piece_waits_for_the_next_delta_no_longer_than_a_gap() -> None:
    async def stuck() -> AsyncIterator[Delta]:
        for number in range(1, 4):
            yield Delta(0, "a", number)
            await asyncio.sleep(0)
        await asyncio.sleep(30)

    async def seconds() -> float:
        merged, start = _merged([stuck()], lambda: 0.1), time.monotonic()
        assert sum([len(await anext(merged)) for _ in range(2)]) == 3
        return time.monotonic() - start

    assert 0.15 < asyncio.run(seconds()) < 5


def test_several_streams_and_errors() -> None:
    assert sum(asyncio.run(pieces(math.inf, tokens(3), tokens(9)))) == 12
    with pytest.raises(ValueError, match="the engine's"):
        asyncio.run(pieces(math.inf, tokens(3, fails=True), tokens(9)))


def test_a_long_answer_goes_in_portions_that_are_written_quickly() -> None:
    """All of 3,500 scored tokens in one message held the loops of the replica and the gateway up for half a second."""
    top = tuple(Alternative(id, b" token", -1.0) for id in range(20))
    tokens = [Token(id, b" token", -1.0, 6 * id, top) for id in range(300)]
    for prompt in (0, 1, PORTION, PORTION + 1, 300):
        for new in (0, 1, PORTION, PORTION + 1, 300):
            last = Delta(1, "whole", 2 * new, tuple(tokens[:new]), "length", tuple(tokens[:prompt]))
            deltas = [Delta(0, "a", 1), last, Delta(0, "b", 2, finish="stop")]
            found = list(portions(deltas))
            assert joined(delta for portion in found for delta in portion) == joined(deltas)
            assert all(len(delta.prompt) + len(delta.tokens) <= 2 * PORTION for portion in found for delta in portion)
            assert all(len(portion) <= PORTION for portion in found)
    assert [len(portion) for portion in portions([Delta(0, "a", n) for n in range(100)])] == [64, 36]
