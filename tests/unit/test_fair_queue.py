"""Whoever waits gets its turn in bounded time, whatever its size: the queue under random mixes, without a clock."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest

from raymodels.config import TenantConfig
from raymodels.serve.fair_queue import FairQueue, Full, Room, Slot


def tenant(name: str, priority: int = 1) -> TenantConfig:
    return TenantConfig(name=name, keys=(), priority=priority)


@dataclass(eq=False)
class Asked(Slot):
    """A request, each sequence of which holds its place for ``seconds``, at a token a second."""

    who: str = ""
    seconds: int = 1
    arrived: float = 0.0
    ahead: int = 0
    """Tokens that its tenant waited for when it had arrived, its own included."""
    waited: float = math.inf
    """Until the last of its sequences got a place."""


@dataclass
class Simulation:
    """A model whose places are given away by a queue, in virtual time."""

    queue: FairQueue
    now: float = 0.0
    served: dict[str, int] = field(default_factory=dict)
    done: list[Asked] = field(default_factory=list)
    most_running: int = 0
    _ends: list[tuple[float, int, Asked]] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    def ask(self, who: TenantConfig, sequences: int, seconds: int) -> Asked:
        asked = Asked(sequences * seconds, sequences, who=who.name, seconds=seconds, arrived=self.now)
        gone = self.queue.join(who, asked)
        assert not gone
        assert asked.line
        asked.ahead = asked.line.tokens
        self._grant()
        return asked

    def run(self, until: float) -> None:
        while self._ends and self._ends[0][0] <= until:
            self.now, _, asked = heapq.heappop(self._ends)
            self.queue.give_back(asked, 1)
            if not asked.waiting and not asked.running:
                asked.used_tokens = asked.tokens
                self.queue.leave(asked)
                self.done.append(asked)
            self._grant()
        self.now = until if math.isfinite(until) else self.now

    def _grant(self) -> None:
        before = {id(slot): slot.granted for line in self.queue._lines.values() for slot in line.slots}
        for asked in self.queue.grant():
            assert isinstance(asked, Asked)
            new = asked.granted - before.get(id(asked), 0)
            self.served[asked.who] = self.served.get(asked.who, 0) + new * asked.seconds
            for _ in range(new):
                heapq.heappush(self._ends, (self.now + asked.seconds, next(self._number), asked))
            if not asked.waiting:
                asked.waited = self.now - asked.arrived
        self.most_running = max(self.most_running, self.queue.running_sequences)
        assert self.queue.running_sequences <= self.queue.room.running


def room(places: int, reserve: float = 0.25) -> Room:
    return Room(places, 10**6, 10**9, reserved=min(places - 1, round(places * reserve)))


LONGEST_S = 20


def random_mix(seed: int) -> tuple[Simulation, dict[str, int]]:
    """Some tenants of random priorities and habits, for some time: many small requests, few large ones, both."""
    draw = random.Random(seed)
    simulation = Simulation(FairQueue(room(draw.choice([1, 2, 4, 8, 32, 33]), draw.choice([0.0, 0.25, 0.5]))))
    priorities = {f"t{number}": draw.choice([1, 1, 2, 5]) for number in range(draw.randint(2, 6))}
    habits = {name: (draw.choice([1, 3, 40, 300]), draw.uniform(0.3, 1.5)) for name in priorities}
    for _ in range(150):
        name = draw.choice(list(priorities))
        most, load = habits[name]
        sequences, seconds = draw.randint(1, most), draw.randint(1, LONGEST_S)
        simulation.ask(tenant(name, priorities[name]), sequences, seconds)
        # About as much work arrives as the model does, more of it from some.
        pause = sequences * seconds / simulation.queue.room.running / load
        simulation.run(simulation.now + draw.expovariate(1 / pause))
    simulation.run(math.inf)
    return simulation, priorities


@pytest.mark.parametrize("seed", range(40))
def test_nobody_waits_longer_than_for_the_work_ahead_at_its_fair_share(seed: int) -> None:
    simulation, priorities = random_mix(seed)
    queue = simulation.queue
    assert len(simulation.done) == 150
    assert (queue.running, queue.running_sequences, queue.waiting, queue.waiting_tokens) == (0, 0, 0, 0)
    places = queue.room.running - queue.room.reserved
    for asked in simulation.done:
        share = priorities[asked.who] / sum(priorities.values())
        # Its tenant may have had one sequence before that still counts, and what runs has to end.
        bound = (asked.ahead + LONGEST_S) / share / places + LONGEST_S
        assert asked.waited <= bound, f"{asked.who} of {priorities}, {asked.sequences} x {asked.seconds} s"


@pytest.mark.parametrize("size", [2, 17, 24, 25, 32, 33, 288])
def test_a_large_request_gets_its_turn_while_another_tenant_never_stops(size: int) -> None:
    simulation = Simulation(FairQueue(room(32)))
    for _ in range(200):
        simulation.ask(tenant("busy"), 1, 1)
    large = simulation.ask(tenant("large"), size, 1)
    while large.waited == math.inf:
        assert simulation.now < 2 * size / 24 + 2
        simulation.run(simulation.now + 1)
        for _ in range(32):
            simulation.ask(tenant("busy"), 1, 1)


@pytest.mark.parametrize(("size", "seconds"), [(24, 1), (32, 3), (288, 1)])
def test_large_requests_leave_another_tenant_its_half(size: int, seconds: int) -> None:
    """Both always have requests waiting, one of them large ones."""
    simulation = Simulation(FairQueue(room(32)))
    for second in range(300):
        for name, sequences in (("large", size), ("small", 1)):
            while simulation.queue._lines.get(name) is None or simulation.queue._lines[name].sequences < 64:
                simulation.ask(tenant(name), sequences, seconds if name == "large" else 1)
        simulation.run(second)
    large, small = simulation.served["large"], simulation.served["small"]
    assert abs(large - small) <= 0.05 * (large + small)
    assert large + small >= 0.9 * 24 * 300  # and no place was kept empty for them


def test_a_tenant_with_nothing_waiting_is_let_in_whatever_its_size() -> None:
    queue = FairQueue(Room(1, 8, 10**9))
    loud = [Slot(1, 1) for _ in range(9)]
    for slot in loud:
        assert not queue.join(tenant("loud"), slot)
        queue.grant()
    with pytest.raises(Full):
        queue.join(tenant("loud"), Slot(1, 1))
    large = Slot(288, 288)
    queue.join(tenant("quiet"), large)
    queue.grant()
    with pytest.raises(Full):
        queue.join(tenant("quiet"), Slot(1, 1))
    queue.leave(loud[0])
    assert queue.grant() == [large]


def test_whoever_is_refused_sends_nobody_away() -> None:
    """Two others have more in the queue, and room for this one there would not be without both."""
    queue = FairQueue(Room(1, 10, 10**9))
    for name in "bc":
        for _ in range(5):
            queue.join(tenant(name), Slot(1, 1))
    queue.join(tenant("a"), Slot(1, 1))
    before = queue.waiting_sequences
    with pytest.raises(Full):
        queue.join(tenant("a"), Slot(3, 3))
    assert queue.waiting_sequences == before


def test_what_has_begun_is_not_sent_away() -> None:
    queue = FairQueue(Room(2, 4, 10**9))
    begun = Slot(6, 6)
    queue.join(tenant("a"), begun)
    queue.grant()
    assert (begun.granted, begun.waiting) == (2, 4)
    assert queue.join(tenant("b"), Slot(1, 1)) == []
    queue.leave(begun)
    assert (queue.waiting_sequences, queue.running_sequences) == (1, 0)
