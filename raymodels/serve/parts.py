"""A request computed in parts, each as soon as it has places at the model: what gets all of its places at once is one.

A part is a request of its own, for some of the texts or prompts, or for some choices of one prompt. Sequences are
numbered through, choice ``c`` of prompt ``p`` being ``p * n + c``, so that a part's are those from some number on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar, cast

from raymodels.config import EngineConfig
from raymodels.serve.admission import Turn
from raymodels.serve.answers import Usage
from raymodels.serve.engine import Delta
from raymodels.serve.quotas import Work, sequences
from raymodels.serve.routing import Call
from raymodels.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Request, refused

AHEAD = 16
"""Pieces of a streamed answer that are fetched before they are sent."""
Kind = TypeVar("Kind", bound=Work)


def check_size(request: Work, engine: EngineConfig) -> None:
    """
    Raises:
        Refused: 400, no replica with this engine can ever hold it, not even in parts; names the field and the limit.
    """
    held, asked = engine.max_batch + engine.max_queue, sequences(request)
    if isinstance(request, EmbeddingRequest):
        if asked > held:
            raise refused(f"{asked} inputs are over the {held} held at once", "input")
        return
    if request.n > engine.max_batch:
        raise refused(f"n {request.n} is over the {engine.max_batch} choices decoded at once", "n")
    if asked > held:
        message = f"{asked // request.n} prompts with n {request.n} are over the {held} choices held at once"
        raise refused(f"{message}: send fewer", "n" if isinstance(request, ChatRequest) else "prompt")


def cut(request: Kind, begin: int, places: int) -> tuple[Kind, int]:
    """The part of a request that begins with a sequence, and how many it has: at most as many as there are places."""
    changes, size = _cut(request, begin, places)
    return cast(Kind, request.model_copy(update=changes)), size


def _cut(request: Work, begin: int, places: int) -> tuple[dict[str, object], int]:
    if isinstance(request, EmbeddingRequest):
        texts = request.inputs[begin : begin + places]
        return {"input": texts}, len(texts)
    prompt, choice = divmod(begin, request.n)
    if not choice and (whole := min(places, sequences(request) - begin) // request.n):
        return _prompts(request, prompt, whole), whole * request.n
    choices = min(places, request.n - choice)
    # Choice i of a prompt draws from seed + i, whichever part it is in.
    seed = None if request.seed is None else request.seed + choice
    return {"n": choices, "seed": seed, **_prompts(request, prompt, 1)}, choices


def _prompts(request: Request, begin: int, count: int) -> dict[str, object]:
    return {} if isinstance(request, ChatRequest) else {"prompt": request.prompts[begin : begin + count]}


async def in_parts(request: Kind, turn: Turn, compute: Callable[[Kind, int], Awaitable[None]]) -> None:
    """Have a request computed part by part; several may be under way. The first that fails ends the others.

    Args:
        compute: computes a part, given the number of its first sequence.
    """

    async def one(part: Kind, begin: int, places: int) -> None:
        await compute(part, begin)
        turn.done(places)

    begin = 0
    try:
        async with asyncio.TaskGroup() as parts:
            while begin < turn.sequences:
                end = begin + await turn.places()
                while begin < end:
                    part, size = cut(request, begin, end - begin)
                    parts.create_task(one(part, begin, size))
                    begin += size
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def sent(
    request: Request, turn: Turn, send: Callable[[Request], Awaitable[Call]], check: Callable[[], Awaitable[int]]
) -> Call | PartedCall:
    """A request in the hands of a replica, all of it or its first part.

    Args:
        send: sends a request to a replica; returns once that has taken it.
        check: the prompt tokens of the whole; raises `Refused` if any part of it cannot be answered.
    """
    if not turn.waiting:
        return await send(request)
    several = isinstance(request, CompletionRequest) and len(request.prompts) > 1
    call = PartedCall(request, turn, send, await check() if several else None)
    await call.accept()
    return call


class PartedCall:
    """As `routing.Call`, for a request that did not get all of its places at once.

    A replica that dies is followed by another one for each part, until a delta of the part has been seen.

    Args:
        send: as in `sent`.
        prompt_tokens: of all prompts; none if all parts have the same prompt.
    """

    def __init__(
        self, request: Request, turn: Turn, send: Callable[[Request], Awaitable[Call]], prompt_tokens: int | None
    ) -> None:
        self._request, self._turn, self._send = request, turn, send
        self._ready: asyncio.Queue[list[Delta] | Exception | None] = asyncio.Queue(AHEAD if request.stream else 0)
        self._taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._got: Callable[[list[Delta]], None] = lambda deltas: None
        self._prompt_tokens = prompt_tokens
        self.usage = Usage(0)
        self.ignored: tuple[str, ...] = ()
        """As `routing.Call.ignored`: of the first part, which has the same fields as the others."""

    async def accept(self) -> None:
        """Wait until a replica has taken the first part, or refused it."""
        self._task = asyncio.create_task(self._run())
        try:
            first = await self._taken
        except BaseException:
            self.cancel()
            raise
        self.usage.prompt_tokens = first if self._prompt_tokens is None else self._prompt_tokens

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Deltas of all parts as they come. Closing the iterator gives the request up; raises as `Call.deltas`."""
        try:
            while (item := await self._ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.cancel()

    async def whole(self, got: Callable[[list[Delta]], None]) -> list[Delta]:
        """All deltas at once; as `Call.whole`."""
        self._got = got
        return [delta async for deltas in self.deltas() for delta in deltas]

    def cancel(self) -> None:
        """Give the request up, unless it has ended."""
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            await in_parts(self._request, self._turn, self._compute)
            await self._ready.put(None)
        except Exception as error:
            if self._taken.done():
                await self._ready.put(error)
            else:
                self._taken.set_exception(error)

    async def _compute(self, part: Request, begin: int) -> None:
        call = await self._send(part)
        if not self._taken.done():
            self.ignored = call.ignored
            self._taken.set_result(call.usage.prompt_tokens)
        try:
            if part.stream:
                async with aclosing(call.deltas()) as pieces:
                    async for deltas in pieces:
                        await self._ready.put(self._noted(deltas, begin))
            else:
                whole = await call.whole(lambda deltas: self._got(self._noted(deltas, begin)))
                await self._ready.put(_numbered(whole, begin))
        finally:
            call.cancel()

    def _noted(self, deltas: list[Delta], begin: int) -> list[Delta]:
        numbered = _numbered(deltas, begin)
        for delta in numbered:
            self.usage.add(delta)
        return numbered


def _numbered(deltas: list[Delta], begin: int) -> list[Delta]:
    return [replace(delta, choice=begin + delta.choice) for delta in deltas]
