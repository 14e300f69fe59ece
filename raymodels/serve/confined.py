"""Work on what clients send, in processes of its own: one that computes or allocates without end is ended, alone.

A worker (`confined_worker`) is a plain subprocess that has imported the function and waits. For every call it forks, so
that ending a call costs a millisecond, and what a call has allocated is gone after it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from raymodels.errors import RaymodelsError
from raymodels.serve.confined_worker import ANSWER, CALL, Status

START_S = 120
"""Longest that a worker may take to import its function."""
PATIENCE, PATIENCE_S = 10, 5
"""On a busy machine, a call may take so many times its seconds, and at least this long."""
DYING_S = 1
"""Longest between the end of a process's socket and its own, which tells why."""


class Unfinished(RaymodelsError):
    """The function did not return. No message of these errors holds anything of the data."""


class TooLong(Unfinished):
    """It was ended after its seconds of processor time."""


class TooLarge(Unfinished):
    """It asked for more memory than it may have."""


class Failed(Unfinished):
    """It raised, or its process died; the message is the exception's or the signal's name."""


class Lost(Failed):
    """The worker itself died or did not start: nothing is known of the data."""


class Busy(Unfinished):
    """The machine was too busy to let it have its seconds: the same call may succeed later."""


class Confined:
    """Calls one function from bytes to bytes in processes that can be ended. Of one event loop.

    Args:
        target: ``package.module:function``.
        workers: calls at once; the others wait.
        memory_bytes: most that a call may allocate.
        seconds: of processor time, unless a call says otherwise.
        arguments: where there are any, ``target`` is called with them when a worker starts, and returns the function.
    """

    def __init__(
        self, target: str, *, workers: int, memory_bytes: int, seconds: float, arguments: Sequence[str] = ()
    ) -> None:
        self._command = [target, str(memory_bytes), *arguments]
        self._count, self._memory_bytes, self._seconds = workers, memory_bytes, seconds
        self._idle: list[_Worker] = []
        self._calls: set[asyncio.Task[bytes]] = set()
        self._free = asyncio.Semaphore(workers)

    async def start(self) -> None:
        """Start all workers ahead; else the first calls do.

        Raises:
            Lost: the function cannot be imported; the worker's standard error, which is ours, says why.
        """
        await asyncio.gather(*(self._start() for _ in range(self._count)))

    async def call(self, data: bytes, seconds: float | None = None) -> bytes:
        """What the function returns. Should the caller be cancelled, the call ends by itself, within its seconds.

        Raises:
            TooLong, TooLarge, Failed, Lost, Busy: it did not return.
        """
        await self._free.acquire()
        call = asyncio.create_task(self._call(data, self._seconds if seconds is None else seconds))
        self._calls.add(call)
        call.add_done_callback(self._called)
        return await asyncio.shield(call)

    async def close(self) -> None:
        """End all workers, and the calls that they are at."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        for worker in self._idle:
            await worker.end()
        self._idle.clear()

    async def _start(self) -> None:
        async with self._free:
            self._idle.append(await self._worker())

    def _called(self, call: asyncio.Task[bytes]) -> None:
        self._calls.discard(call)
        self._free.release()
        if not call.cancelled():
            call.exception()  # has been seen, even where the caller was cancelled

    async def _call(self, data: bytes, seconds: float) -> bytes:
        worker = await self._worker()
        try:
            async with asyncio.timeout(max(PATIENCE * seconds, PATIENCE_S)):
                status, answer = await worker.call(data, seconds)
        except TimeoutError:
            await worker.end()
            self._idle.append(_Worker(self._command))  # ready before the next call needs it
            raise Busy(f"no {seconds:g} s of processor time in {PATIENCE} times as long") from None
        except (EOFError, ConnectionError):
            died = await worker.end(DYING_S)
            self._idle.append(_Worker(self._command))
            raise Lost(died) from None
        except BaseException:
            await worker.end()
            raise
        self._idle.append(worker)
        return self._result(status, answer, seconds)

    async def _worker(self) -> _Worker:
        """One that is ready; some may have died meanwhile, as all processes may."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.dead:
                break
            await worker.end()
        else:
            worker = _Worker(self._command)
        await worker.ready()
        return worker

    def _result(self, status: int, answer: bytes, seconds: float) -> bytes:
        if status == Status.TOO_LONG:
            raise TooLong(f"takes more than {seconds:g} s")
        if status == Status.TOO_LARGE:
            raise TooLarge(f"takes more than {self._memory_bytes // 2**20} MiB")
        if status == Status.FAILED:
            raise Failed(answer.decode())
        return answer


class _Worker:
    """A running worker. Its standard input is a socket, which carries calls to it and answers back."""

    def __init__(self, command: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "raymodels.serve.confined_worker", str(os.getpid()), *command],
                stdin=theirs.fileno(),
                env=_environment(),
                start_new_session=True,  # it gets no signals of our terminal
            )
        self._socket.setblocking(False)
        self._ready = False

    async def ready(self) -> None:
        """Wait until it has imported its function.

        Raises:
            Lost: it has not.
        """
        if self._ready:
            return
        try:
            async with asyncio.timeout(START_S):
                await self._receive(1)
        except (TimeoutError, EOFError, ConnectionError) as error:
            died = await self.end(0 if isinstance(error, TimeoutError) else DYING_S)
            raise Lost(f"it did not start: {died}") from None
        except BaseException:
            await self.end()
            raise
        self._ready = True

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    async def call(self, data: bytes, seconds: float) -> tuple[int, bytes]:
        """The status of a call, and its answer."""
        await self._send(CALL.pack(len(data), seconds))
        await self._send(data)
        status, size = ANSWER.unpack(await self._receive(ANSWER.size))
        return status, bytes(await self._receive(size))

    async def _send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def _receive(self, size: int) -> bytearray:
        """Exactly so many bytes; raises EOFError where there are no more."""
        received, loop = bytearray(size), asyncio.get_running_loop()
        left = memoryview(received)
        while left:
            count = await loop.sock_recv_into(self._socket, left)
            if not count:
                raise EOFError
            left = left[count:]
            await asyncio.sleep(0)  # the loop does not wait where there are bytes
        return received

    async def end(self, wait_s: float = 0) -> str:
        """Kill it, unless it dies by itself in so many seconds; says how it died."""
        until = time.monotonic() + wait_s
        while self._process.poll() is None:
            if time.monotonic() >= until:
                self._process.kill()
            await asyncio.sleep(0.001)
        self._socket.close()
        code = self._process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """What Python needs to find its modules, as we do, and no key or password of ours."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path or str(os.getcwd()) for path in sys.path),  # noqa: PTH109
        "TOKENIZERS_PARALLELISM": "false",  # a process that forks has one thread
        "RAYON_NUM_THREADS": "1",
    }
