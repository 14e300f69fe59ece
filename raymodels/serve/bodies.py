"""Bodies of requests, read where they harm nobody: small ones here, large ones in processes that can be ended.

Parsing a large body holds the interpreter's lock, so that a thread of its own would not help those who wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from raymodels.serve.body_reader import Reader, read
from raymodels.serve.confined import Busy, Confined, Failed, Lost, TooLarge, TooLong, Unfinished
from raymodels.serve.schema import RETRY_AFTER_S, Problem, Refused
from raymodels.serve.sealed import unpacked

log = logging.getLogger(__name__)

SMALL_BYTES = 256 << 10
"""What is read here, in some ten milliseconds at worst."""
WORKERS = 2
MEMORY_BYTES, MEMORY_FACTOR = 64 << 20, 40
"""What reading one may take, whatever its size and for each byte of the largest: lists of JSON take 20 times theirs."""
SECONDS, SECONDS_PER_MIB = 5.0, 1.0


class Bodies:
    """Reads bodies; of one event loop.

    Args:
        most_bytes: of a body, which bounds the memory and the time that reading one takes.
    """

    def __init__(self, most_bytes: int) -> None:
        self._readers = Confined(
            "raymodels.serve.body_reader:read_packed",
            workers=WORKERS,
            memory_bytes=MEMORY_BYTES + MEMORY_FACTOR * most_bytes,
            seconds=SECONDS + SECONDS_PER_MIB * most_bytes / 2**20,
        )
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def read(
        self, body: bytes, reader: Reader, tenant: str, deadline: float, check: Callable[[], None] = lambda: None
    ) -> Any:
        """The request in a body. Large ones are read one at a time of each tenant.

        Args:
            reader: one of `body_reader.READERS`.
            deadline: when to give up, in the event loop's time.
            check: raises what refuses the request at once; called when its turn has come.

        Raises:
            Refused: 400, it is wrong; 413, it takes too much to read; 503, it cannot be read now; 504, the deadline
                has passed.
        """
        check()
        if len(body) <= SMALL_BYTES:
            return read(body, reader)
        try:
            async with asyncio.timeout_at(deadline):
                found = unpacked(await self._in_turn(body, reader, tenant, check))
        except TimeoutError:
            message = "the body was not read within the request's time"
            raise Refused(Problem(status=504, message=message, type="server_error", code="timeout")) from None
        except Unfinished as error:
            raise Refused(_unread(error)) from None
        if isinstance(found, Problem):
            raise Refused(found)
        return found

    async def close(self) -> None:
        """End the processes."""
        await self._readers.close()

    async def _in_turn(self, body: bytes, reader: Reader, tenant: str, check: Callable[[], None]) -> bytes:
        turn = self._turns[tenant]
        await turn.acquire()
        try:
            check()  # again, after those that were read meanwhile
            call = asyncio.create_task(self._readers.call(reader.__name__.encode() + b"\n" + body))
        except BaseException:
            turn.release()
            raise

        def read(call: asyncio.Task[bytes]) -> None:
            turn.release()  # not before, even if nobody waits for it any longer
            if not call.cancelled():
                call.exception()

        call.add_done_callback(read)
        return await asyncio.shield(call)


def _unread(error: Unfinished) -> Problem:
    if isinstance(error, Lost | Busy):
        message = "the body cannot be read now: try again later"
        return Problem(
            status=503, message=message, type="server_error", code="unavailable", retry_after_s=RETRY_AFTER_S
        )
    if isinstance(error, TooLong | TooLarge):
        message = f"the body {error} to be read: send fewer values in it"
        return Problem(status=413, message=message, code="body_too_large")
    assert isinstance(error, Failed)
    log.error("a body ended the process that read it: %s", error)
    return Problem(status=400, message="the body cannot be read")
