"""Large texts for a tokenizer: one at a time of each tenant, so that one tenant's do not keep others' waiting."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from raymodels.config import TenantConfig
from raymodels.serve.schema import Problem, Refused, overloaded

SMALL_BYTES = 16 << 10
MAX_BYTES = 1 << 20
"""Of a body of a tokenizer's routes: what is encoded for nothing but to be told is not cut short by the context."""
MOST_WAITING = 8


@dataclass
class Line:
    """One tenant's texts."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    held: int = 0


class OneEach:
    """Whose large text goes to a tokenizer, of each tenant at most one."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, Line] = defaultdict(Line)

    @asynccontextmanager
    async def turn(self, tenant: TenantConfig, size: int, deadline: float) -> AsyncIterator[None]:
        """A turn for a body of so many bytes, which lasts for the block; what is small needs none.

        Raises:
            Refused: 429, too many of this tenant's wait; 504, the deadline has passed.
        """
        if size <= SMALL_BYTES:
            yield
            return
        line = self._lines[tenant.name]
        if line.held > MOST_WAITING:
            raise Refused(overloaded("too many texts of this key wait to be tokenized: try again later"))
        line.held += 1
        try:
            await self._acquired(line.lock, deadline)
            try:
                yield
            finally:
                line.lock.release()
        finally:
            line.held -= 1

    @staticmethod
    async def _acquired(lock: asyncio.Lock, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            message = "the text waited to be tokenized until the request's time was over"
            raise Refused(Problem(status=504, message=message, type="server_error", code="timeout")) from None
