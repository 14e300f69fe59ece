"""The open connections of a port: how many there may be, and who goes when there are more."""

from __future__ import annotations

import asyncio
import resource
from typing import Protocol

MAX_CONNECTIONS = 4096


class Open(Protocol):
    """A connection, from the moment it was accepted."""

    address: str

    def evict(self) -> None:
        """Close now."""

    def shutdown(self) -> None:
        """Close, after the answer that is under way."""


class Connections:
    """The open connections, at most ``limit``, and at most half of the files that this process may open.

    One that waits for its client, for a request or for the rest of one, makes room for a new one: of the address that
    has most of those, the one that has waited longest. One whose client waits for an answer is left alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = min(limit, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self.tasks: set[asyncio.Task[None]] = set()
        """Requests that are being answered."""
        self.open: set[Open] = set()
        self._waiting: dict[str, dict[Open, None]] = {}

    def make_room(self) -> bool:
        """Whether there is room for one more; another connection may have had to go for it."""
        if len(self.open) < self.limit:
            return True
        if not self._waiting:
            return False
        most = max(self._waiting, key=lambda address: len(self._waiting[address]))
        oldest = next(iter(self._waiting[most]))
        self.remove(oldest)
        oldest.evict()
        return True

    def add(self, connection: Open) -> None:
        self.open.add(connection)
        self.waits(connection)

    def waits(self, connection: Open) -> None:
        """From now on the connection waits for its client."""
        if connection in self.open:
            self._waiting.setdefault(connection.address, {}).setdefault(connection)

    def works(self, connection: Open) -> None:
        """From now on the client waits for its answer."""
        waiting = self._waiting.get(connection.address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def remove(self, connection: Open) -> None:
        self.works(connection)
        self.open.discard(connection)
