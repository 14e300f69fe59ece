"""When a replica sends what its engine has: the first token at once, later ones in pieces of fair size."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator

import pytest

from raymodels.serve.engine import Delta
from raymodels.serve.pace import Pace
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


def test_several_streams_and_errors() -> None:
    assert sum(asyncio.run(pieces(math.inf, tokens(3), tokens(9)))) == 12
    with pytest.raises(ValueError, match="the engine's"):
        asyncio.run(pieces(math.inf, tokens(3, fails=True), tokens(9)))
