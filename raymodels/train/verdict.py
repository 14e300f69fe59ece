"""Which rank holds the others up, decided from what is known of all of them at one moment. Pure: no clock, no process.

A group of ranks is a convoy: whoever is hindmost either is at fault or waits for one that went past the meeting point.
So only the hindmost ranks' silence counts, measured against what their phase may take. A process that the operating
system reports as stopped is at fault in any phase.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raymodels.train.heartbeat import PHASES, RECENT, STEPPING, Beat
from raymodels.train.stacks import Stack

STOPPED = "its process is stopped"
UNREACHABLE = "its node does not answer"
STUCK = "it is stuck outside of any collective"
SKIPPED = "it went past a collective in which the others wait"
UNDECIDED = "all ranks wait in the same collective"

COMPILE_SECONDS = 1800.0


@dataclass(frozen=True)
class Bounds:
    """A standing rank is named within max(``seconds``, ``steps`` x the median step). Tests tighten it."""

    seconds: float = 10.0
    steps: float = 10.0

    def patience(self, beats: Sequence[Beat]) -> float:
        """Seconds after which to act: a part of the bound, as it takes a look and a stack more to name the rank."""
        return self.after(median_step(beats))

    def after(self, step: float | None) -> float:
        """`patience`, given the median step."""
        return 0.7 * max(self.seconds, self.steps * (step or 0.0))


@dataclass(frozen=True)
class Allowance:
    """Seconds between two marks: ``first``, until a rank left the phase once; then ten times the longest so far, or
    ``least`` if that is more."""

    first: float
    least: float


# Those of a step hold until two steps have passed, for compilation and the first allocations; then `Bounds` does.
_STEP = Allowance(first=COMPILE_SECONDS, least=0.0)
ALLOWANCES = {
    "start": Allowance(first=1800.0, least=1800.0),
    "restore": Allowance(first=1800.0, least=1800.0),
    "evaluation": Allowance(first=900.0, least=60.0),
    "report": Allowance(first=300.0, least=60.0),
    "save": Allowance(first=1800.0, least=300.0),
} | dict.fromkeys(STEPPING, _STEP)


@dataclass(frozen=True)
class Verdict:
    """A rank that holds the others up. ``seconds`` without a mark; ``others`` are the innermost frames by rank."""

    rank: int
    host: str
    node: str
    pid: int
    kind: str
    phase: str
    step: int
    seconds: float
    stack: str
    others: dict[int, str]

    @property
    def sentence(self) -> str:
        where = self.phase if self.step < 0 else f"{self.phase} of step {self.step}"
        return (
            f"rank {self.rank} on {self.host} (pid {self.pid}) holds the run up: {self.kind}; "
            f"phase {where}, without progress for {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Slow:
    """A rank whose own work takes ``ratio`` times the others' median; both in seconds per step."""

    rank: int
    host: str
    pid: int
    ratio: float
    seconds: float
    median: float

    @property
    def sentence(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: {self.seconds:.3g} s of its own work per step, "
            f"{self.ratio:.1f} x the others' median"
        )


def median_step(beats: Iterable[Beat]) -> float | None:
    """Seconds; None while no rank has finished two steps."""
    seconds = [each for beat in beats for each in beat.seconds]
    return statistics.median(seconds) if seconds else None


def overdue(beats: Sequence[Beat], bounds: Bounds) -> list[Beat]:
    """The ranks whose silence is too long, empty while all is well, or while the group is not complete."""
    if not beats or sorted(beat.rank for beat in beats) != list(range(beats[0].world_size)):
        return []
    step = median_step(beats)  # once for all: with thousands of ranks it takes a tenth of a second
    patience = bounds.after(step)
    if stopped := [beat for beat in beats if beat.status == "stopped" and beat.silent > patience]:
        return stopped
    under_way = [beat for beat in beats if beat.phase != "ending" and beat.status != "unreachable"]
    if not under_way:
        return []
    hindmost = min(map(position, under_way))
    last = [beat for beat in under_way if position(beat) == hindmost]
    allowed = allowance(last[0].phase, beats, patience, step)  # being at one position, they are in one phase
    return [beat for beat in last if beat.quiet > allowed]


def position(beat: Beat) -> tuple[float, int, int]:
    """How far a rank has come; one that is ending is past all."""
    if beat.phase == "ending":
        return (float("inf"), 0, 0)
    return (beat.step, PHASES.index(beat.phase), beat.within)


def allowance(phase: str, beats: Sequence[Beat], patience: float, step: float | None) -> float:
    """Seconds that a rank may be without a mark in a phase, given the median step."""
    allowed = ALLOWANCES[phase]
    if phase in STEPPING:
        return allowed.first if step is None else patience
    longest = [beat.longest[phase] for beat in beats if phase in beat.longest]
    return max(patience, allowed.least, 10 * max(longest)) if longest else allowed.first


def accuse(beats: Sequence[Beat], stacks: Mapping[int, Stack], bounds: Bounds) -> Verdict | None:
    """Which rank is at fault, given that some are `overdue` and the stacks of all; None if they only compile."""
    late = overdue(beats, bounds)
    if not late or _compiles(late, stacks):
        return None
    patience = bounds.patience(beats)
    unreachable = [beat for beat in beats if beat.status == "unreachable" and beat.silent > patience]
    stopped = [beat for beat in beats if beat.status == "stopped"]
    waiting = [beat for beat in beats if _waits(beat, stacks)]
    if not waiting:  # the frames tell nothing, as on a GPU, where the host waits for the device
        waiting = [beat for beat in beats if beat.phase in ("weigh", "settle")]
    waiters = {beat.rank for beat in waiting}
    busy = [beat for beat in beats if beat.rank not in waiters]
    if stopped:
        guilty, kind = max(stopped, key=lambda beat: beat.silent), STOPPED
    elif unreachable:
        guilty, kind = unreachable[0], UNREACHABLE
    elif waiting and busy:
        seen = [beat for beat in busy if beat.rank in stacks and stacks[beat.rank].lines]
        guilty = min(seen or busy, key=lambda beat: (position(beat), -beat.quiet))
        kind = SKIPPED if position(guilty) > min(map(position, waiting)) else STUCK
    else:
        guilty, differs = _odd_one_out(beats, stacks, prefer_behind=bool(busy))
        kind = STUCK if busy else SKIPPED if differs else UNDECIDED
    progresses = guilty.quiet < patience and guilty.phase != "ending"
    return None if progresses else _verdict(guilty, kind, beats, stacks)


def _odd_one_out(beats: Sequence[Beat], stacks: Mapping[int, Stack], prefer_behind: bool) -> tuple[Beat, bool]:
    """Of ranks that all do alike, the one at another place than most, and whether there is one.

    Where all are in the same phase, the stacks tell places apart. Of two ranks it is the one ahead, or behind.
    """
    places: dict[int, object] = {beat.rank: position(beat) for beat in beats}
    if len(set(places.values())) == 1:
        places = {rank: stacks[rank].lines if rank in stacks else () for rank in places}
    crowd = Counter(places.values())
    order = sorted(beats, key=position, reverse=not prefer_behind)
    return min(order, key=lambda beat: crowd[places[beat.rank]]), len(crowd) > 1


def _waits(beat: Beat, stacks: Mapping[int, Stack]) -> bool:
    return beat.rank in stacks and stacks[beat.rank].waits


def _compiles(late: Sequence[Beat], stacks: Mapping[int, Stack]) -> bool:
    """Whether someone compiles, as a new shape can make it happen at any step, and has not done so for too long."""
    quiet = max(beat.quiet for beat in late)
    return late[0].status != "stopped" and quiet < COMPILE_SECONDS and any(stack.compiles for stack in stacks.values())


def _verdict(guilty: Beat, kind: str, beats: Sequence[Beat], stacks: Mapping[int, Stack]) -> Verdict:
    unknown = Stack(problem="not taken")
    return Verdict(
        rank=guilty.rank,
        host=guilty.host,
        node=guilty.node,
        pid=guilty.pid,
        kind=kind,
        phase=guilty.phase,
        step=guilty.step,
        seconds=guilty.quiet,
        stack=stacks.get(guilty.rank, unknown).text,
        others={beat.rank: stacks.get(beat.rank, unknown).head for beat in beats if beat.rank != guilty.rank},
    )


def slow_ranks(beats: Sequence[Beat], ratio: float = 1.5) -> list[Slow]:
    """The ranks whose own work, by the median of recent steps, is over ``ratio`` times the median of the others'.

    Only what lengthens the step by a tenth or more counts. Empty until all ranks have half a ring of steps.
    """
    if len(beats) < 2 or min(len(beat.own) for beat in beats) < RECENT // 2:
        return []
    own, step = {beat.rank: statistics.median(beat.own) for beat in beats}, median_step(beats) or 0.0
    ordered = sorted(own.values())
    found = []
    for beat in beats:
        mine = own[beat.rank]
        others = _median_without(ordered, mine)
        if mine > ratio * others and mine - others > step / 10:
            found.append(Slow(beat.rank, beat.host, beat.pid, mine / others if others else float("inf"), mine, others))
    return found


def _median_without(ordered: Sequence[float], one: float) -> float:
    """The median of sorted numbers but one of them."""
    place, count = bisect_left(ordered, one), len(ordered) - 1

    def rest(index: int) -> float:
        return ordered[index + (index >= place)]

    return (rest((count - 1) // 2) + rest(count // 2)) / 2
