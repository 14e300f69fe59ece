"""Whose sequence a model computes next: a bounded queue, fair between tenants, one sequence at a time. Knows no clock.

A model is given as many sequences as its replicas decode together; the others wait here, where their order can still
be chosen, instead of in the engine. Every tenant has a line of its own. The next place goes to the line whose tenant
has had the fewest tokens for its priority: start-time fair queueing (Goyal et al., 1996), with estimated tokens as the
cost, settled with the real ones at the end. So a tenant that asks for little is hardly delayed by one that asks for
much. The last places are left to tenants who hold no more than those: whoever asks for little finds one free at once,
instead of when the next long answer of another ends.

A request of many sequences gets its places one by one, as so many requests of its tenant would. So nothing is too large
to get its turn beside others, and no place stays empty until there are enough for something large: a request waits for
what is ahead of it in its line, as much for each other tenant, and the longest sequence that runs.

A full queue refuses who has most in it: it is the newest request of the longest line that has to go, be it the one that
has just arrived or one that waits. Whoever has nothing in it is let in, however much others have.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from raymodels.config import TenantConfig


@dataclass(frozen=True)
class Room:
    """How much of a model's work this gateway may hold: sequences sent to it, sequences and tokens waiting.

    ``reserved`` places of those ``running`` are for tenants with at most as many.
    """

    running: int
    waiting: int
    tokens: int
    reserved: int = 0


class Full(Exception):
    """The queue has no room, and it is the tenant that asks which has most in it."""


@dataclass(eq=False)
class Slot:
    """A request's sequences at a model: some wait for a place, some hold one, and the others are done.

    Set ``used_tokens`` to what it really took before it leaves. ``granted`` is how many have been given a place so far,
    ``running`` how many hold theirs, ``reserved`` of them one of those that are left to tenants with few.
    """

    tokens: int
    sequences: int
    granted: int = 0
    running: int = 0
    reserved: int = 0
    paid: float = 0.0
    """What its line was charged for it."""
    used_tokens: int = 0
    line: Line | None = None
    """Its tenant's, from joining to leaving."""

    @property
    def waiting(self) -> int:
        return self.sequences - self.granted

    def charged(self, sequences: int) -> int:
        """The estimated tokens of its first so many sequences."""
        return self.tokens * sequences // self.sequences


@dataclass(eq=False)
class Line:
    """One tenant's requests waiting for a model. ``served`` is what it has had, in tokens per priority."""

    priority: int
    served: float = 0.0
    slots: deque[Slot] = field(default_factory=deque)
    sequences: int = 0
    tokens: int = 0
    running: int = 0
    """Sequences at the model."""

    def fill(self, room: Room, new: Slot | None = None) -> float:
        """How much of the queue it takes, with a new slot, relative to its priority."""
        sequences, tokens = (new.sequences, new.tokens) if new else (0, 0)
        return max((self.sequences + sequences) / room.waiting, (self.tokens + tokens) / room.tokens) / self.priority


class FairQueue:
    """The work of one model. ``running`` and ``waiting`` count requests; one of which parts wait and run is in both.

    Args:
        room: may be replaced at any time, as replicas come and go.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._lines: dict[str, Line] = {}
        self._order: list[tuple[float, int, Line]] = []  # a heap: what a line had had when it was put here
        self._ordered = itertools.count()
        self._now = 0.0  # virtual time: what the line has had whose turn it is
        self.running = self.running_sequences = 0
        self._reserved = 0  # of the reserved places, those that are taken
        self.waiting = self.waiting_sequences = self.waiting_tokens = 0

    def join(self, tenant: TenantConfig, slot: Slot) -> list[Slot]:
        """Put a request at the end of its tenant's line; returns those that had to go for it, which have left.

        Raises:
            Full: it has to go itself.
        """
        line = self._lines.setdefault(tenant.name, Line(tenant.priority))
        line.priority = tenant.priority
        gone = self._make_room(line, slot)
        if not line.slots:
            line.served = max(line.served, self._now)
        self._append(line, slot)
        return gone

    def grant(self) -> list[Slot]:
        """Give away the places that are free; returns who has got any."""
        got: dict[Slot, None] = {}
        while self.waiting and (line := self._next()):
            self._now = max(self._now, self._least_served().served)
            slot = line.slots[0]
            got[slot] = None
            self._charge(line, slot)
            self._take(line, slot)
            if not slot.waiting:
                line.slots.popleft()
            self._put(line)
        if not self.waiting:
            self._order.clear()
        return list(got)

    def give_back(self, slot: Slot, places: int) -> None:
        """Take back places whose sequences are done."""
        assert slot.line and places <= slot.running
        self._return(slot.line, slot, places)

    def leave(self, slot: Slot) -> None:
        """Forget a request, wherever it is, and settle what it was charged."""
        line = slot.line
        assert line
        if slot.waiting:
            line.slots.remove(slot)
            self._count(line, -1, -slot.waiting, slot.charged(slot.granted) - slot.tokens)
        if slot.running:
            self._return(line, slot, slot.running)
        slot.line = None
        if charged := slot.charged(slot.granted):
            line.served += slot.paid * (slot.used_tokens / charged - 1)
        self._put(line)

    def untouched(self) -> list[Slot]:
        """Those that wait and have not been given a place yet."""
        return [slot for line in self._lines.values() for slot in line.slots if not slot.granted]

    def _next(self) -> Line | None:
        """Whose turn it is; of the others, who has a right to what is reserved. None where nobody has a place."""
        first = self._least_served()
        if self._free or self._entitled(first):
            return first
        if self._reserved >= self.room.reserved:
            return None
        entitled = (line for line in self._lines.values() if line.slots and self._entitled(line))
        return min(entitled, key=lambda line: line.served, default=None)

    def _least_served(self) -> Line:
        """Of the lines in which somebody waits. One that has changed since it was put in order is there again."""
        while True:
            served, _, line = self._order[0]
            if line.slots and line.served == served:
                return line
            heapq.heappop(self._order)

    def _put(self, line: Line) -> None:
        """Put a line in order, if somebody waits in it: of what it has had there is a new figure."""
        if line.slots:
            heapq.heappush(self._order, (line.served, next(self._ordered), line))

    @property
    def _free(self) -> bool:
        """Whether the model has a place for anybody."""
        return self.running_sequences - self._reserved < self.room.running - self.room.reserved

    def _entitled(self, line: Line) -> bool:
        """Whether a line may have one of the reserved places now."""
        return self._reserved < self.room.reserved and line.running < self.room.reserved

    def _make_room(self, line: Line, new: Slot) -> list[Slot]:
        """Send away what there is no room for, beginning with the longest line; nobody if that does not help."""
        gone: list[tuple[Line, Slot]] = []
        while self.waiting and (
            self.waiting_sequences + new.sequences > self.room.waiting
            or self.waiting_tokens + new.tokens > self.room.tokens
        ):
            longest = max(self._shortable(), key=lambda other: other.fill(self.room), default=None)
            if longest is None or longest.fill(self.room) <= line.fill(self.room, new):
                if not line.slots:
                    break
                for other, slot in reversed(gone):
                    self._append(other, slot)
                raise Full
            gone.append((longest, longest.slots[-1]))
            self.leave(longest.slots[-1])
        return [slot for _, slot in gone]

    def _shortable(self) -> Iterator[Line]:
        """Lines whose newest request may be sent away: what has been begun is not given up."""
        return (line for line in self._lines.values() if line.slots and not line.slots[-1].granted)

    def _append(self, line: Line, slot: Slot) -> None:
        slot.line = line
        line.slots.append(slot)
        self._count(line, 1, slot.sequences, slot.tokens)
        if len(line.slots) == 1:
            self._put(line)

    def _charge(self, line: Line, slot: Slot) -> None:
        """Count one more sequence as granted."""
        cost = slot.charged(slot.granted + 1) - slot.charged(slot.granted)
        slot.granted += 1
        self._count(line, 0 if slot.waiting else -1, -1, -cost)
        # What a line gets of the reserve before its turn is taken from nobody who waits, so it costs it no turn.
        before, line.served = line.served, max(line.served, min(line.served, self._now) + cost / line.priority)
        slot.paid += line.served - before

    def _take(self, line: Line, slot: Slot) -> None:
        if not self._free:
            slot.reserved += 1
            self._reserved += 1
        self.running += not slot.running
        slot.running += 1
        line.running += 1
        self.running_sequences += 1

    def _return(self, line: Line, slot: Slot, places: int) -> None:
        reserved = max(0, slot.reserved - (slot.running - places))  # those that are for anybody first
        slot.reserved -= reserved
        self._reserved -= reserved
        slot.running -= places
        line.running -= places
        self.running -= not slot.running
        self.running_sequences -= places

    def _count(self, line: Line, requests: int, sequences: int, tokens: int) -> None:
        line.sequences += sequences
        line.tokens += tokens
        self.waiting += requests
        self.waiting_sequences += sequences
        self.waiting_tokens += tokens
