"""Waiting for a turn at a model: the quotas of all tenants, and behind them the queues of all models.

A request is let in by `Admission.slot` once it has its first place, and is told of further ones by its `Turn`. Names of
models come and go meanwhile: what waits goes to where its name leads now.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from raymodels.config import TenantConfig
from raymodels.serve.fair_queue import FairQueue, Full, Room, Slot
from raymodels.serve.metrics import QUEUE_REQUESTS, QUEUE_SECONDS, QUEUE_TOKENS, RUNNING
from raymodels.serve.quotas import Quotas, estimated_prompt
from raymodels.serve.schema import Problem, Refused

RATE_S = 30.0
"""Time constant of the rate at which a queue empties, in the time in which somebody waits in it."""
LONGEST_RETRY_S = 60
GAUGES = (RUNNING, QUEUE_REQUESTS, QUEUE_TOKENS)


@dataclass(eq=False)
class Turn(Slot):
    """A request's places at a model, as they are given to it. ``queued_s`` is how long it waited for the first one."""

    model: str = ""
    """As the request names it: the queue may be that of another name, an adapter's base."""
    deadline: float = math.inf
    queued_s: float = 0.0
    queue: Queue | None = None
    refusal: Refused | None = None
    taken: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def places(self) -> int:
        """Wait for places that have not been told of before; how many there are.

        Raises:
            Refused: 504, the deadline has passed.
        """
        await self.wait()
        new, self.taken = self.granted - self.taken, self.granted
        return new

    def done(self, places: int) -> None:
        """Give places back before the whole request has been answered."""
        if self.queue:
            self.queue.give_back(self, places)
            self.queue.dispatch()

    async def wait(self) -> None:
        """Wait for a new place, or for the end of the queue; raises as `places`, or 429 what put it out."""
        try:
            async with asyncio.timeout_at(self.deadline):
                while self.queue and self.granted == self.taken:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            message = "the request waited for its turn until its time was over"
            raise Refused(Problem(status=504, message=message, type="server_error", code="timeout")) from None
        if self.refusal:
            raise self.refusal

    def wake(self) -> None:
        self._changed.set()

    def put_out(self, refusal: Refused | None = None) -> None:
        """It is in no queue any more: refused, or to look for another one."""
        self.queue, self.refusal = None, refusal
        self.wake()


class Drain:
    """How fast a queue empties, in estimated tokens that leave it for a place, per second in which somebody waits."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._since: float | None = None
        """Somebody waits, and the time up to here is counted."""

    def note(self, tokens: int, waiting: bool, now: float) -> None:
        """So many tokens have left for places, and somebody still waits or nobody does."""
        if self._since is not None:
            spent = now - self._since
            fade = math.exp(-spent / RATE_S)
            self._tokens = self._tokens * fade + tokens
            self._seconds = self._seconds * fade + spent
        self._since = now if waiting else None

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until so many tokens have left. Where none has yet, as long again as there was to wait so far."""
        seconds = self._seconds + (0.0 if self._since is None else now - self._since)
        return tokens * seconds / self._tokens if self._tokens else seconds


class Queue(FairQueue):
    """The fair queue of one model, whose requests are told of their turns.

    Args:
        current: the room now, or none if it is to stay as it was; asked whenever places may be given away.
    """

    def __init__(self, model: str, room: Room, current: Callable[[], Room | None] = lambda: None) -> None:
        super().__init__(room)
        self.model = model
        self._current = current
        self._drain = Drain()
        self._gauges = [gauge.labels(model) for gauge in GAUGES]

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def enter(self, tenant: TenantConfig, turn: Turn) -> None:
        """Have a request wait for its turn.

        Raises:
            Refused: 429, the queue is full.
        """
        self.room = self._current() or self.room
        try:
            gone = self.join(tenant, turn)
        except Full:
            raise self._full() from None
        turn.queue = self
        for other in gone:
            assert isinstance(other, Turn)
            other.put_out(self._full())
        self.dispatch()

    def exit(self, turn: Turn) -> None:
        """Give back all that a request has here, and its place in the line."""
        turn.queue = None
        self.leave(turn)
        self.dispatch()

    def dispatch(self) -> None:
        """Grant what there is room for now."""
        self.room = self._current() or self.room
        waiting = self.waiting_tokens
        for slot in self.grant():
            assert isinstance(slot, Turn)
            slot.wake()
        self._drain.note(waiting - self.waiting_tokens, self.waiting > 0, asyncio.get_running_loop().time())
        for gauge, value in zip(self._gauges, (self.running, self.waiting, self.waiting_tokens), strict=True):
            gauge.set(value)

    def turn_out(self, leads: Callable[[str], str | None]) -> None:
        """Have those look for another queue whose names do not lead here any more, unless they have a place already."""
        for turn in self.untouched():
            assert isinstance(turn, Turn)
            if leads(turn.model) != self.model:
                self.leave(turn)
                turn.put_out()

    def close(self) -> None:
        """Show no figures of it any more."""
        for gauge in GAUGES:
            gauge.remove(self.model)

    def _full(self) -> Refused:
        message = "too many requests wait for this model, most of them of this key: try again later"
        wait_s = self._drain.wait_s(self.waiting_tokens, asyncio.get_running_loop().time())
        retry_after_s = min(LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
        return Refused(
            Problem(
                status=429, message=message, type="rate_limit_error", code="queue_full", retry_after_s=retry_after_s
            )
        )


class Admission:
    """The queues of all models, behind the quotas of all tenants.

    Args:
        room: model -> its `Room`; asked only of those that there are.
        quotas: the accounts that tokens are charged to.
        base: the name of a model -> the model in whose queue it waits; raises `Refused` if there is none any more.
    """

    def __init__(
        self, room: Callable[[str], Room], quotas: Quotas, base: Callable[[str], str] = lambda model: model
    ) -> None:
        self._room = room
        self._base = base
        self._quotas = quotas
        self._queues: dict[str, Queue] = {}

    def check(self, tenant: TenantConfig, body_bytes: int) -> None:
        """
        Raises:
            Refused: 429, the tenant is over a quota, whatever a body of so many bytes holds.
        """
        self._quotas.check(tenant, estimated_prompt(body_bytes), asyncio.get_running_loop().time())

    @asynccontextmanager
    async def slot(
        self, tenant: TenantConfig, model: str, tokens: int, sequences: int, deadline: float
    ) -> AsyncIterator[Turn]:
        """A place at a model that is there, for as long as the block lasts; of several sequences, at least one.

        Args:
            model: the name that the request was sent to.
            tokens: of prompt and answer, estimated.
            sequences: choices that are decoded; 0 is under the quota of tokens and waits for nothing.
            deadline: when to give up waiting, in the event loop's time.

        Raises:
            Refused: 404, there is no such model any more; 429, over a quota or the queue is full; 504, the deadline
                has passed.
        """
        loop = asyncio.get_running_loop()
        turn, arrived = Turn(tokens, sequences, model=model, deadline=deadline), loop.time()
        account = self._quotas.charge(tenant, tokens, arrived)
        try:
            while sequences and turn.queue is None:  # it may be put out of one, by a change of the names
                self.queue(self._base(model)).enter(tenant, turn)
                await turn.wait()
            turn.queued_s = loop.time() - arrived
            if turn.queue:
                QUEUE_SECONDS.labels(turn.queue.model).observe(turn.queued_s)
            yield turn
        finally:
            if queue := turn.queue:
                queue.exit(turn)
                self._forget(queue)
            self._quotas.settle(account, tokens, turn.used_tokens)

    def queue(self, model: str) -> Queue:
        if model not in self._queues:

            def room() -> Room | None:
                return self._room(model) if self._leads(model) == model else None

            self._queues[model] = Queue(model, self._room(model), room)
        return self._queues[model]

    def dispatch(self) -> None:
        """To be called when some model may have more room: its replicas have changed."""
        for queue in self._queues.values():
            queue.dispatch()

    def renamed(self) -> None:
        """To be called when names lead elsewhere: what waits goes there, or learns that its name is gone."""
        for queue in list(self._queues.values()):
            queue.turn_out(self._leads)
            queue.dispatch()
            self._forget(queue)

    def _leads(self, model: str) -> str | None:
        try:
            return self._base(model)
        except Refused:
            return None

    def _forget(self, queue: Queue) -> None:
        """Drop the queue of a model that there is no more, once nothing is in it."""
        if queue.idle and self._queues.get(queue.model) is queue and self._leads(queue.model) != queue.model:
            del self._queues[queue.model]
            queue.close()
