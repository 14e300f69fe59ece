"""What every second of a run went to: events in, account out. Pure; it knows nothing of files.

An event is a mapping with ``time`` (unix seconds), ``kind`` and ``driver``, the number of the process that wrote it.
These kinds count:

- ``started`` (``attempt``, ``resumed_from_step``): an attempt to train begins.
- ``report`` (``step``, ``seconds``, ``at``): what the time since the attempt's last report went to, by kind, as rank 0
  measured it; ``at`` is when it did, in unix seconds, for a report takes a while to arrive. Where the wall clock saw
  another duration, the difference is ``unaccounted``.
- ``resized`` with a ``resumed_from_step``: the attempt goes on from there with other workers.
- ``failed`` and ``finished``: the attempt ends. One without such an end, whose driver was killed, ended at the last
  event before another driver's first.

Of an attempt that did not finish, the time after its last report is lost. So is the work of every reported step that a
later attempt does again, in proportion where that one resumes between two reports. Where it resumes after the last
report, the steps up to there count, at the pace of those before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]

KINDS = {
    "scheduling": "waiting for the cluster and for worker processes",
    "start": "imports, opening the data, building the model and the engine",
    "restore": "loading a checkpoint",
    "compile": "the first step of an attempt, with all that compiles in it",
    "data": "waiting for batches",
    "step": "optimizer steps that count",
    "evaluation": "the held-out loss",
    "blocked_by_save": "training held up by a checkpoint",
    "other": "the rest of the training loop",
    "ending": "from the last report to the end: last save, teardown, publishing",
    "lost_to_rework": "steps that were done again, and the end of attempts that failed",
    "down": "between the end of an attempt and the next one's start",
    "unaccounted": "covered by no report",
}
# What it takes to do steps; this is what is lost when they are done again.
WORK = ("data", "step", "evaluation", "blocked_by_save", "other")


@dataclass
class Interval:
    """A stretch of the run and what it went to. It may have done the steps from ``after`` (exclusive) to ``step``."""

    start: float
    seconds: dict[str, float]
    after: int = 0
    step: int = 0


@dataclass
class Attempt:
    """One attempt to train, from its event ``started``. Times are unix seconds, ``down`` the seconds before it.

    ``ending`` is open, finished, failed, or killed, which left no record. ``failure`` is the event of a failed one.
    """

    number: int
    started: float
    resumed_from_step: int
    down: float
    event: Event
    step: int
    workers: int | None = None
    ended: float | None = None
    ending: str = "open"
    failure: Event = field(default_factory=dict)

    @property
    def cause(self) -> str:
        """Why it ended before the run did, in a sentence."""
        if self.ending == "killed":
            return "the driver left no record of its end"
        if self.ending != "failed":
            return ""
        kind = self.failure.get("fault") or self.failure.get("error") or "error"
        told = str(self.failure.get("cause") or self.failure.get("message") or "").strip().partition("\n")[0]
        return f"{kind}: {told}" if told else str(kind)


@dataclass(frozen=True)
class Account:
    """All seconds of a run from its first event to its last, by kind. They sum to ``wall``.

    ``unaccounted`` may be negative where reports overlap. ``error`` is how far each attempt's reports are from the wall
    clock, added up regardless of sign, in seconds.
    """

    begin: float
    wall: float
    seconds: dict[str, float]
    error: float
    step: int
    finished: bool
    attempts: list[Attempt]
    intervals: list[Interval]

    @property
    def goodput(self) -> float:
        """The share of the wall time that went to steps that count, from 0 to 1."""
        return self.seconds.get("step", 0.0) / self.wall if self.wall else 0.0

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)

    def timeline(self, columns: int) -> list[str]:
        """The kind that took most of each of equally long stretches, in the order of time."""
        if not self.wall:
            return []
        width = self.wall / columns
        shares: list[dict[str, float]] = [{} for _ in range(columns)]
        for interval in self.intervals:
            at = interval.start - self.begin
            for kind in sorted(interval.seconds, key=_position):
                end = at + max(0.0, interval.seconds[kind])
                for column in range(int(at / width), min(columns, int(end / width) + 1)):
                    overlap = min(end, (column + 1) * width) - max(at, column * width)
                    shares[column][kind] = shares[column].get(kind, 0.0) + overlap
                at = end
        return [max(share, key=lambda kind: share[kind]) if share else "unaccounted" for share in shares]


class Ledger:
    """Takes a run's events one by one, in constant time each, and tells the account so far."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self._driver: int | None = None  # who wrote the last event
        self._last = 0.0  # the time of the last event
        self._since = 0.0  # up to where time is booked
        self._step = 0
        self._finished = False
        self._drift = 0.0  # this attempt's seconds on the wall clock less its reported ones
        self._error = 0.0
        self._totals: dict[str, float] = {}
        self._intervals: list[Interval] = []
        self._standing: list[Interval] = []  # those whose steps count, by step
        self._tail: Interval | None = None  # of the last attempt, after its last report
        self._attempts: list[Attempt] = []

    def add(self, event: Event) -> None:
        kind = event["kind"]
        if self._finished and kind != "started":
            return  # the command was given again: the run is over
        now = max(float(event["time"]), self._last)  # a clock may be set back
        if self._begin is None:
            self._begin = self._since = self._last = now
        if kind == "started" or event.get("driver") != self._driver:
            self._end(self._last, "killed")
            self._driver = event.get("driver")
        if kind == "started":
            self._start(event, now)
        elif kind == "report" and self._attempt:
            self._report(event, now)
        elif kind == "resized" and self._attempt and "resumed_from_step" in event:
            self._book("lost_to_rework", now)
            self._rework(int(event["resumed_from_step"]))
        elif kind == "failed":
            self._end(now, "failed", event)
        elif kind == "finished":
            self._end(now, "finished")
            self._book("down", now)
            self._finished = True
        self._last = now

    def account(self) -> Account:
        """The account so far. What an open attempt has not reported yet is ``unaccounted``."""
        begin = self._last if self._begin is None else self._begin
        tail = Interval(self._since, {"unaccounted": self._last - self._since})
        seconds = dict(self._totals)
        seconds["unaccounted"] = seconds.get("unaccounted", 0.0) + tail.seconds["unaccounted"]
        return Account(
            begin=begin,
            wall=self._last - begin,
            seconds={kind: seconds[kind] for kind in sorted(seconds, key=_position)},
            error=self._error + abs(self._drift),
            step=self._step,
            finished=self._finished,
            attempts=list(self._attempts),
            intervals=[*self._intervals, tail],
        )

    @property
    def _attempt(self) -> Attempt | None:
        """The open attempt."""
        return self._attempts[-1] if self._attempts and self._attempts[-1].ending == "open" else None

    def _start(self, event: Event, now: float) -> None:
        resumed = int(event["resumed_from_step"])
        down = now - self._since if self._attempts else 0.0
        self._book("down" if self._attempts else "scheduling", now)
        self._save_from_tail(resumed)
        self._rework(resumed)
        number = int(event.get("attempt", len(self._attempts) + 1))
        self._attempts.append(Attempt(number, now, resumed, down, event, step=resumed))
        self._finished = False

    def _report(self, event: Event, now: float) -> None:
        step, reported = int(event["step"]), dict(event.get("seconds", {}))
        if step <= self._step:  # nobody said that it went back, but it did
            self._rework(step - 1)
        now = min(now, max(float(event.get("at", now)), self._since))
        drift = now - self._since - sum(reported.values())
        self._drift += drift
        self._add(Interval(self._since, {**reported, "unaccounted": drift}, after=self._step, step=step))
        self._standing.append(self._intervals[-1])
        self._since, self._step = now, step
        self._attempts[-1].step, self._attempts[-1].workers = step, event.get("world_size")

    def _end(self, now: float, ending: str, failure: Event | None = None) -> None:
        """Close the open attempt, if there is one."""
        if attempt := self._attempt:
            booked = self._book("ending" if ending == "finished" else "lost_to_rework", now)
            self._tail = None if ending == "finished" else booked
            attempt.ended, attempt.ending, attempt.failure = now, ending, failure or {}
            self._error += abs(self._drift)
            self._drift = 0.0

    def _rework(self, resumed: int) -> None:
        """Steps after ``resumed`` are to be done again: what they took is lost."""
        while self._standing and self._standing[-1].step > resumed:
            interval = self._standing.pop()
            kept = max(interval.after, resumed)
            lost = (interval.step - kept) / (interval.step - interval.after)
            for kind in WORK:
                moved = lost * interval.seconds.get(kind, 0.0)
                if moved:
                    self._move(interval, moved, kind, "lost_to_rework")
            interval.step = kept
            if kept > interval.after:
                self._standing.append(interval)
        self._step = resumed

    def _save_from_tail(self, resumed: int) -> None:
        """Steps that were committed but never reported are not done again, so they count."""
        tail, self._tail = self._tail, None
        if tail is None or not self._standing or resumed <= self._step:
            return
        last = self._standing[-1]
        pace = last.seconds.get("step", 0.0) / (last.step - last.after)
        tail.after, tail.step = self._step, resumed
        self._move(tail, min(tail.seconds["lost_to_rework"], pace * (resumed - self._step)), "lost_to_rework", "step")
        self._standing.append(tail)

    def _move(self, interval: Interval, moved: float, source: str, target: str) -> None:
        for seconds in (interval.seconds, self._totals):
            seconds[source] -= moved
            seconds[target] = seconds.get(target, 0.0) + moved

    def _book(self, kind: str, now: float) -> Interval | None:
        """All time up to now went to one kind."""
        booked = Interval(self._since, {kind: now - self._since}) if now > self._since else None
        if booked:
            self._add(booked)
        self._since = now
        return booked

    def _add(self, interval: Interval) -> None:
        self._intervals.append(interval)
        for kind, seconds in interval.seconds.items():
            self._totals[kind] = self._totals.get(kind, 0.0) + seconds


def account(events: Iterable[Event]) -> Account:
    """The account of a run from all its events, in their order."""
    ledger = Ledger()
    for event in events:
        ledger.add(event)
    return ledger.account()


def _position(kind: str) -> int:
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)
