"""Who waits for which request's deltas, and how many may. The same for every engine, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from raymodels.errors import ServeError
from raymodels.serve.engine import Delta, GenerateRequest, QueueFull

Item = Delta | Exception
Queue = asyncio.Queue[Item]


@dataclass(frozen=True)
class _Listener:
    """A queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: Queue
    choices: int


class Listeners:
    """Between the thread that decodes and the event loops that asked.

    Args:
        most: choices that may run and wait at once.
        abort: called with the id of a request whose listener has heard all or listens no longer.
    """

    def __init__(self, most: int, abort: Callable[[str], None]) -> None:
        self._most, self._abort = most, abort
        self._lock = threading.Lock()
        self._listeners: dict[str, _Listener] = {}
        self._failure: ServeError | None = None

    @property
    def choices(self) -> int:
        """Choices that run or wait."""
        with self._lock:
            return self._count()

    def add(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """The deltas of a request, for the event loop that is running here. Closing the iterator aborts the request.

        Raises:
            QueueFull: there are too many.
            ServeError: the engine has ended.
        """
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue(), request.n)
        with self._lock:
            self._check()
            waiting = self._count()
            if waiting + request.n > self._most:
                raise QueueFull(f"{waiting} choices are running or queued, and no more may be: try again later")
            assert request.id not in self._listeners
            self._listeners[request.id] = listener
        return self._deltas(request.id, listener)

    def remove(self, id: str) -> bool:
        """Send a request nothing more; whether it was there."""
        with self._lock:
            return self._listeners.pop(id, None) is not None

    def put(self, items: Sequence[tuple[str, Item]]) -> None:
        """Hand items over to requests by their ids, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Queue, Item]]] = {}
        with self._lock:
            for id, item in items:
                if listener := self._listeners.get(id):
                    by_loop.setdefault(listener.loop, []).append((listener.queue, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:
                if not loop.is_closed():  # a caller that has gone with its loop is no failure of the engine
                    raise

    def fail(self, error: ServeError) -> None:
        """The engine has ended: so do all requests, and none can be added any more. The first error stays."""
        with self._lock:
            self._failure = self._failure or error
            ids = list(self._listeners)
        self.put([(id, error) for id in ids])

    def check(self) -> None:
        """Raise what the engine has ended with, if it has."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # or it would grow with every call

    def _count(self) -> int:
        return sum(listener.choices for listener in self._listeners.values())

    async def _deltas(self, id: str, listener: _Listener) -> AsyncIterator[Delta]:
        unfinished = listener.choices
        try:
            while unfinished:
                item = await listener.queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish is not None
                yield item
        finally:
            self._abort(id)


def _put(items: list[tuple[Queue, Item]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
