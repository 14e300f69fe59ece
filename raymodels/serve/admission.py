"""Which request goes to a model next: a bounded queue in the gateway, fair between tenants.

A model is given as many sequences as its replicas decode together; the others wait here, where their order can still
be chosen, instead of in the engine. Every tenant has a line of its own. The next request comes from the
line whose tenant has had the fewest tokens for its priority: start-time fair queueing (Goyal et al., 1996), with
estimated tokens as the cost, settled with the real ones at the end. So a tenant that asks for little is hardly
delayed by one that asks for much. The last places are left to tenants who hold no more than those: whoever asks for
little finds one free at once, instead of when the next long answer of another ends.

A full queue refuses who has most in it: it is the newest request of the longest line that is answered 429, be it
the one that has just arrived or one that waits.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from raymodels.config import TenantConfig
from raymodels.serve.metrics import QUEUE_REQUESTS, QUEUE_SECONDS, QUEUE_TOKENS, RUNNING
from raymodels.serve.quotas import Quotas
from raymodels.serve.schema import Problem, Refused

RATE_S = 30.0
"""Time constant of the rate at which a queue moves, which a refusal's Retry-After is made of."""
LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Room:
    """How much of a model's work this gateway may hold: sequences sent to it, sequences and tokens waiting.

    ``reserved`` places of those ``running`` are for tenants with at most as many.
    """

    running: int
    waiting: int
    tokens: int
    reserved: int = 0


@dataclass(eq=False)
class Slot:
    """A request's place at a model. Set ``used_tokens`` to what it really took before giving the place back."""

    tokens: int
    sequences: int
    granted: asyncio.Future[None]
    queued_s: float = 0.0
    used_tokens: int = 0


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


class Queue:
    """The work of one model.

    Args:
        room: asked anew whenever it matters: it changes with the replicas.
    """

    def __init__(self, model: str, room: Callable[[], Room]) -> None:
        self._room = room
        self._lines: dict[str, Line] = {}
        self._order: list[tuple[float, int, Line]] = []  # a heap: what a line had had when it was put here
        self._ordered = itertools.count()
        self._now = 0.0  # virtual time: what the line had had that was served last
        self._moved, self._moved_at = 0.0, 0.0
        self.running = self.running_sequences = 0
        self.waiting = self.waiting_sequences = self.waiting_tokens = 0
        self._gauges = (RUNNING.labels(model), QUEUE_REQUESTS.labels(model), QUEUE_TOKENS.labels(model))

    async def enter(self, tenant: TenantConfig, slot: Slot, deadline: float) -> Line:
        """Wait for the slot's turn. Who is cancelled meanwhile has never been here.

        Raises:
            Refused: 429, the queue is full; 504, the deadline has passed.
        """
        line = self._lines.setdefault(tenant.name, Line(tenant.priority))
        line.priority = tenant.priority
        if self.waiting or not self._fits(line, slot):
            self._make_room(line, slot)
        if not line.slots:
            line.served = max(line.served, self._now)
        self._count(line, slot, 1)
        line.slots.append(slot)
        if len(line.slots) == 1:
            self._put(line)
        self.dispatch()
        try:
            async with asyncio.timeout_at(deadline):
                await slot.granted
        except BaseException as error:
            if slot in line.slots:
                self._drop(line, slot)
            elif slot.granted.done() and not slot.granted.cancelled() and slot.granted.exception() is None:
                self.leave(line, slot)
            if isinstance(error, TimeoutError):
                message = "the request waited for its turn until its time was over"
                raise Refused(Problem(status=504, message=message, type="server_error", code="timeout")) from None
            raise
        return line

    def leave(self, line: Line, slot: Slot) -> None:
        """Give a slot back that was granted."""
        self._run(line, slot, -1)
        line.served += (slot.used_tokens - slot.tokens) / line.priority
        self._put(line)
        now = asyncio.get_running_loop().time()
        self._moved = self._moved * math.exp((self._moved_at - now) / RATE_S) + slot.used_tokens
        self._moved_at = now
        self.dispatch()

    def dispatch(self) -> None:
        """Grant what there is room for now."""
        while self.waiting:
            line = self._next()
            if line is None:
                break
            slot = line.slots.popleft()
            self._count(line, slot, -1)
            if slot.granted.cancelled():
                continue
            self._now = max(self._now, line.served)
            line.served += slot.tokens / line.priority
            self._put(line)
            self._run(line, slot, 1)
            slot.granted.set_result(None)
        if not self.waiting:
            self._order.clear()
        for gauge, value in zip(self._gauges, (self.running, self.waiting, self.waiting_tokens), strict=True):
            gauge.set(value)

    def _next(self) -> Line | None:
        """Whose turn it is; of the others, who has a right to what is reserved."""
        first = self._least_served()
        if self._fits(first, first.slots[0]):
            return first
        if self.running_sequences >= self._room().running:
            return None
        entitled = [line for line in self._lines.values() if line.slots and self._reserved(line, line.slots[0])]
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

    def _fits(self, line: Line, slot: Slot) -> bool:
        """Whether the model can take it now. One that is too large at any time goes when nothing else runs."""
        room, running = self._room(), self.running_sequences + slot.sequences
        return self.running == 0 or running <= room.running - room.reserved or self._reserved(line, slot)

    def _reserved(self, line: Line, slot: Slot) -> bool:
        room, running = self._room(), self.running_sequences + slot.sequences
        return running <= room.running and line.running + slot.sequences <= room.reserved

    def _make_room(self, line: Line, new: Slot) -> None:
        """Refuse what the queue has no room for, beginning with the longest line. What is alone in it may be larger."""
        room = self._room()
        while self.waiting and (
            self.waiting_sequences + new.sequences > room.waiting or self.waiting_tokens + new.tokens > room.tokens
        ):
            longest = max((other for other in self._lines.values() if other.slots), key=lambda other: other.fill(room))
            if longest.fill(room) <= line.fill(room, new):
                raise self._full()
            last = longest.slots[-1]
            self._drop(longest, last)
            if not last.granted.done():
                last.granted.set_exception(self._full())

    def _drop(self, line: Line, slot: Slot) -> None:
        line.slots.remove(slot)
        self._count(line, slot, -1)
        self.dispatch()

    def _run(self, line: Line, slot: Slot, sign: int) -> None:
        line.running += sign * slot.sequences
        self.running += sign
        self.running_sequences += sign * slot.sequences

    def _count(self, line: Line, slot: Slot, sign: int) -> None:
        line.sequences += sign * slot.sequences
        line.tokens += sign * slot.tokens
        self.waiting += sign
        self.waiting_sequences += sign * slot.sequences
        self.waiting_tokens += sign * slot.tokens

    def _full(self) -> Refused:
        message = "too many requests wait for this model, most of them of this key: try again later"
        wait_s = self.waiting_tokens * RATE_S / max(self._moved, 1)
        retry_after_s = min(LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
        return Refused(
            Problem(
                status=429, message=message, type="rate_limit_error", code="queue_full", retry_after_s=retry_after_s
            )
        )


class Admission:
    """The queues of all models, behind the quotas of all tenants.

    Args:
        room: model -> its `Room`.
        gateways: gateways that share the requests. Each knows its own alone, so each grants its part.
    """

    def __init__(self, room: Callable[[str], Room], gateways: int = 1) -> None:
        self._room = room
        self._quotas = Quotas(gateways)
        self._queues: dict[str, Queue] = {}

    @asynccontextmanager
    async def slot(
        self, tenant: TenantConfig, model: str, tokens: int, sequences: int, deadline: float
    ) -> AsyncIterator[Slot]:
        """A place at a model that is there, for as long as the block lasts.

        Args:
            tokens: of prompt and answer, estimated.
            sequences: choices that are decoded; 0 is under the quotas and waits for nothing.
            deadline: when to give up waiting, in the event loop's time.

        Raises:
            Refused: 429, over a quota or the queue is full; 504, the deadline has passed.
        """
        loop = asyncio.get_running_loop()
        slot, arrived = Slot(tokens, sequences, loop.create_future()), loop.time()
        account = self._quotas.open(tenant, tokens, arrived)
        try:
            if not sequences:
                yield slot
                return
            queue = self.queue(model)
            line = await queue.enter(tenant, slot, deadline)
            slot.queued_s = loop.time() - arrived
            QUEUE_SECONDS.labels(model).observe(slot.queued_s)
            try:
                yield slot
            finally:
                queue.leave(line, slot)
        finally:
            self._quotas.close(account, tokens, slot.used_tokens)

    def queue(self, model: str) -> Queue:
        if model not in self._queues:
            self._queues[model] = Queue(model, lambda: self._room(model))
        return self._queues[model]

    def dispatch(self) -> None:
        """To be called when some model may have more room: its replicas have changed."""
        for queue in self._queues.values():
            queue.dispatch()
