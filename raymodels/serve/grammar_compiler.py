"""Compiles grammars, where they can do no harm first.

A grammar of a few bytes may take hours, or all memory there is. So each is first compiled by a `confined` process, and
only what has passed there is compiled here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from llguidance import LLMatcher

from raymodels.serve import grammar_rules
from raymodels.serve.confined import Busy, Confined, Failed, Lost, TooLarge, TooLong
from raymodels.serve.engine import Grammar, InvalidRequest, QueueFull
from raymodels.serve.grammar_rules import COMPLEX, LATE, Unusable, lark
from raymodels.serve.text import Text

T = TypeVar("T")

SECONDS, QUICK_S = 1.0, 0.1
"""Of processor time that a grammar may take. What takes longer than the second waits for others of its kind alone."""
MEMORY_BYTES = 2**27
TEXT_BYTES = 2**20
HELD_BYTES = 2**29
"""Of compiled grammars, in use or kept for the next request that brings the same one."""
LEAST_BYTES = 2**20
"""What a compiled grammar is taken to need even if its process already had the memory."""
KEPT_VERDICTS = 4096
FAULTS_S = 10.0
"""Longest that several grammars are judged for."""
NICENESS = 5
"""Added to the threads that compile: tokens go before."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a grammar is refused, if it is, and the bytes that it takes, compiled."""

    why: str | None
    bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Compiled(Grammar):
    """A grammar that has passed, of which each text takes a copy."""

    matcher: LLMatcher
    bytes: int


class Compiler:
    """An event loop in a thread, and what runs in it."""

    def __init__(self, text: Text, vocabulary: int) -> None:
        self._text, self._columns = text, max(vocabulary, text.size)
        self._threads = ThreadPoolExecutor(2, "grammars", initializer=os.nice, initargs=(NICENESS,))
        self._slow = asyncio.Lock()
        self._verdicts = OrderedDict[bytes, Verdict]()
        self._kept = OrderedDict[bytes, Compiled]()
        self._held = WeakValueDictionary[bytes, Compiled]()  # those kept, and those in use
        self._running: dict[tuple[str, bytes], asyncio.Task[Any]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="grammars", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        definition, ends = self._text.backend.to_str(), sorted(self._text.ends)
        self._tokenizer = self._threads.submit(grammar_rules.tokenizer, definition, self._columns, ends)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(definition)
            file.flush()
            self._confined = Confined(
                f"{grammar_rules.__name__}:Probe",
                workers=2,
                memory_bytes=MEMORY_BYTES,
                seconds=QUICK_S,
                arguments=[file.name, str(self._columns), json.dumps(ends)],
            )
            self._loop.run_forever()

    def compile(self, grammar: Grammar) -> Future[Compiled]:
        return self._run(self._compile(grammar))

    def faults(self, grammars: Sequence[Grammar]) -> Future[list[str | None]]:
        return self._run(self._faults(grammars))

    def close(self) -> None:
        self._run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._threads.shutdown()

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._confined.close()

    async def _once(self, key: tuple[str, bytes], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What some work returns, done once for all who ask meanwhile, even if they leave."""
        if key not in self._running:
            self._running[key] = task = asyncio.create_task(work())
            task.add_done_callback(partial(self._done, key))
        found: T = await asyncio.shield(self._running[key])
        return found

    def _done(self, key: tuple[str, bytes], task: asyncio.Task[Any]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # has been seen, even where nobody waits for it any longer

    async def _compile(self, grammar: Grammar) -> Compiled:
        if isinstance(grammar, Compiled):
            return grammar
        verdict, key = await self._verdict(grammar), _key(grammar)
        if verdict.why is not None:
            raise _refused(grammar, verdict.why)
        if held := self._held.get(key):
            self._keep(key, held)
            return held
        self._make_room(verdict.bytes)
        return await self._once(("compile", key), lambda: self._compile_here(key, grammar, verdict.bytes))

    async def _compile_here(self, key: bytes, grammar: Grammar, size: int) -> Compiled:
        def compiled() -> LLMatcher:
            return grammar_rules.compiled(lark(grammar.kind, grammar.text), self._tokenizer.result())

        try:
            matcher = await asyncio.wrap_future(self._threads.submit(compiled))
        except Unusable as error:
            raise _refused(grammar, str(error)) from None
        self._held[key] = made = Compiled(grammar.kind, grammar.text, matcher, size)
        self._keep(key, made)
        return made

    def _keep(self, key: bytes, compiled: Compiled) -> None:
        self._kept[key] = compiled
        self._kept.move_to_end(key)

    def _make_room(self, size: int) -> None:
        while sum(each.bytes for each in self._held.values()) + size > HELD_BYTES:
            if not self._kept:
                raise QueueFull("the grammars of the requests that are running take all memory: try again later")
            self._kept.popitem(last=False)

    async def _faults(self, grammars: Sequence[Grammar]) -> list[str | None]:
        until = self._loop.time() + FAULTS_S
        return [await self._fault(each, until) for each in grammars]

    async def _fault(self, grammar: Grammar, until: float) -> str | None:
        try:
            async with asyncio.timeout_at(until):
                return (await self._verdict(grammar)).why
        except TimeoutError:
            return LATE

    async def _verdict(self, grammar: Grammar) -> Verdict:
        key = _key(grammar)
        if key not in self._verdicts:
            return await self._once(("judge", key), lambda: self._judge(key, grammar))
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    async def _judge(self, key: bytes, grammar: Grammar) -> Verdict:
        self._verdicts[key] = verdict = await self._found(grammar)
        while len(self._verdicts) > KEPT_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    async def _found(self, grammar: Grammar) -> Verdict:
        if len(grammar.text) > TEXT_BYTES:
            return Verdict(f"it is over {TEXT_BYTES} bytes")
        data = json.dumps([grammar.kind, grammar.text]).encode()
        try:
            why, size = json.loads(await self._probed(data))
            return Verdict(why, max(size, LEAST_BYTES) + len(data))
        except TooLong:
            return Verdict(f"it takes more than {SECONDS:g} s to compile")
        except TooLarge:
            return Verdict(f"it takes more than {MEMORY_BYTES // 2**20} MiB to compile")
        except Lost:
            raise
        except Failed:  # its stack has overflowed
            return Verdict(COMPLEX)
        except Busy as error:
            raise QueueFull("the server is too busy to compile a grammar: try again later") from error

    async def _probed(self, data: bytes) -> bytes:
        try:
            return await self._confined.call(data)
        except TooLong:
            async with self._slow:  # so that one of the two workers is always there for what is quick
                return await self._confined.call(data, SECONDS)


def _key(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind} {grammar.text}".encode(errors="surrogatepass")).digest()


def _refused(grammar: Grammar, why: str) -> InvalidRequest:
    what = "JSON schema" if grammar.kind == "json_schema" else "grammar"
    return InvalidRequest(f"the {what} cannot be compiled: {why}", "grammar")
