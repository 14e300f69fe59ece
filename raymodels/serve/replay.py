"""The autoscaling policy on a trace, without a cluster: what replicas, queue and waits would have been.

The model goes second by second. Requests wait in one queue, first in first out, and enter as soon as a replica has a
free slot. Requests that run share what the replicas serve evenly, each at most ``request_tokens_per_s``, each replica
at most ``replica_tokens_per_s``: a request of so many tokens, prompt and answer, is done when it has had as many. A
replica ordered now answers after ``start_up_s``; one that is let go is first one that is still starting. The queue is
bounded by ``max_queue`` requests for each replica, and as many for the first one; the rest are refused.

Left out: the imbalance between replicas, the difference between prompt and answer tokens, requests that are cancelled
or tried again, replicas that fail or start more slowly than others, and what happens within a second. What a replica
that is let go was computing goes on elsewhere, while in Ray Serve it finishes there.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymodels.config import AutoscalingConfig
from raymodels.errors import ConfigError
from raymodels.serve.autoscale import Decision, Observation, State, decide
from raymodels.serve.traces import Trace

RATE_S = 10.0
"""Time constant of the rates that are reported, as of a real replica's."""
RECENT_S = 30
COLUMNS = 1500
"""Points of a line in the picture."""


@dataclass(frozen=True)
class Fleet:
    """What a replica can do."""

    slots: int = 32
    """Requests that it computes together."""
    max_queue: int = 256
    """Requests that may wait for it."""
    request_tokens_per_s: float = 25.0
    """What one request gets where there is room."""
    replica_tokens_per_s: float = 400.0
    """What all requests of a replica get together."""
    start_up_s: float = 60.0


@dataclass(frozen=True)
class Change:
    """A decision that changed the number of replicas."""

    second: int
    before: int
    decision: Decision


@dataclass
class Replay:
    """What became of a trace. Arrays are of shape [seconds]; waits are those of requests by the second they came in."""

    trace: Trace
    replicas: NDArray[np.int64]
    """Those that answer."""
    ordered: NDArray[np.int64]
    """Those that answer or start."""
    queued: NDArray[np.int64]
    refused: NDArray[np.int64]
    longest_wait: NDArray[np.float64]
    """Seconds that the last of this second's requests waited for a slot; those never served, until the end."""
    waits: dict[int, int] = field(default_factory=dict)
    """Seconds waited -> requests."""
    changes: list[Change] = field(default_factory=list)
    served: int = 0
    unfinished: int = 0
    """Still running or waiting when the trace ended."""

    @property
    def reversals(self) -> int:
        """How often a change went the other way than the one before."""
        up = [change.decision.replicas > change.before for change in self.changes]
        return sum(first != second for first, second in pairwise(up))

    def wait(self, share: float) -> float:
        """Seconds for a slot that this share of the requests stayed within; those that came to run."""
        if not self.waits:
            return 0.0
        seconds = sorted(self.waits)
        rank = np.cumsum([self.waits[second] for second in seconds])
        return float(seconds[int(np.searchsorted(rank, share * rank[-1]))])

    def summary(self) -> dict[str, Any]:
        """The replay as one row of plain data."""
        return {
            "trace": self.trace.name,
            "hours": len(self.replicas) / 3600,
            "requests": int(self.trace.requests.sum()),
            "served": self.served,
            "refused": int(self.refused.sum()),
            "unfinished": self.unfinished,
            "replica_hours": float(self.ordered.sum()) / 3600,
            "most_replicas": int(self.replicas.max(initial=0)),
            "wait_p50_s": self.wait(0.5),
            "wait_p95_s": self.wait(0.95),
            "wait_p99_s": self.wait(0.99),
            "most_queued": int(self.queued.max(initial=0)),
            "decisions": len(self.changes),
            "reversals": self.reversals,
        }


@dataclass(slots=True)
class _Waiting:
    """Requests that came in the same second."""

    came: int
    count: int
    tokens: float
    """Of each."""


class _Serving:
    """Queue, slots and replicas at one moment of the model above."""

    def __init__(self, fleet: Fleet, replicas: int) -> None:
        self.fleet, self.replicas = fleet, replicas
        self.starting: deque[tuple[int, int]] = deque()  # (second they answer, how many)
        self.queue: deque[_Waiting] = deque()
        self.running = self.queued = 0
        self.queued_tokens = 0.0
        self.had = 0.0  # tokens that a request has had which has run all the time
        self.ends: list[tuple[float, int]] = []  # (what `had` must reach, how many requests end then)

    @property
    def ordered(self) -> int:
        return self.replicas + sum(count for _, count in self.starting)

    def scale(self, wanted: int, second: int) -> None:
        more = wanted - self.ordered
        if more > 0:
            self.starting.append((second + math.ceil(self.fleet.start_up_s), more))
        while more < 0 and self.starting:
            due, count = self.starting.pop()
            more += count
            if more > 0:
                self.starting.append((due, more))
        self.replicas += min(more, 0)

    def answer(self, second: int) -> None:
        """Replicas whose start-up is over answer from now on."""
        while self.starting and self.starting[0][0] <= second:
            self.replicas += self.starting.popleft()[1]

    def take(self, requests: int, tokens: float, second: int) -> int:
        """Queue this second's requests as far as the bound allows; how many were refused."""
        free = max(0, self.replicas * self.fleet.slots - self.running)
        room = free + self.fleet.max_queue * max(1, self.replicas) - self.queued
        taken = max(0, min(requests, room))
        if taken:
            self.queue.append(_Waiting(second, taken, tokens))
            self.queued += taken
            self.queued_tokens += taken * tokens
        return requests - taken

    def compute(self) -> int:
        """One second of computing; how many requests it finished."""
        done = 0
        if self.running and self.replicas:
            fair = self.replicas * self.fleet.replica_tokens_per_s / self.running
            self.had += min(self.fleet.request_tokens_per_s, fair)
            while self.ends and self.ends[0][0] <= self.had:
                done += heappop(self.ends)[1]
            self.running -= done
        return done

    def admit(self, second: int) -> list[tuple[int, int]]:
        """Fill free slots from the queue; (second they came, how many) of those that now run."""
        free = self.replicas * self.fleet.slots - self.running
        admitted = []
        while free > 0 and self.queue:
            first = self.queue[0]
            count = min(free, first.count)
            first.count -= count
            if not first.count:
                self.queue.popleft()
            heappush(self.ends, (self.had + first.tokens, count))
            free -= count
            self.running += count
            self.queued -= count
            self.queued_tokens -= count * first.tokens
            admitted.append((first.came, count))
        return admitted

    def full_rate(self) -> float:
        """Tokens per second of one replica all of whose slots are taken."""
        return min(self.fleet.replica_tokens_per_s, self.fleet.slots * self.fleet.request_tokens_per_s)


def replay(trace: Trace, config: AutoscalingConfig, fleet: Fleet) -> Replay:
    """Run the policy on a trace, one decision a second, beginning with ``min_replicas`` that answer."""
    seconds = len(trace.requests)
    counts = [np.zeros(seconds, np.int64) for _ in range(4)]
    replicas, ordered, queued, refused = counts
    result = Replay(trace, replicas, ordered, queued, refused, np.zeros(seconds))
    arrivals, sizes = trace.requests.tolist(), (trace.prompt_tokens + trace.completion_tokens).tolist()
    serving, state = _Serving(fleet, config.min_replicas), State()
    reported = _Reported()
    for second in range(seconds):
        serving.answer(second)
        refused[second] = serving.take(arrivals[second], sizes[second], second)
        result.served += serving.compute()
        for came, count in serving.admit(second):
            result.waits[second - came] = result.waits.get(second - came, 0) + count
            result.longest_wait[came] = second - came
            reported.waited(second, second - came + 1 / fleet.request_tokens_per_s, count)
        seen = reported.observation(second, serving, arrivals[second] * sizes[second], config.target_ttft_s is not None)
        there = serving.ordered
        decision = decide(seen, state, config)
        state = decision.state
        if decision.replicas != there:
            result.changes.append(Change(second, there, decision))
            serving.scale(decision.replicas, second)
        replicas[second], ordered[second], queued[second] = serving.replicas, serving.ordered, serving.queued
    for waiting in serving.queue:
        result.longest_wait[waiting.came] = seconds - waiting.came
    result.unfinished = serving.running + serving.queued
    return result


class _Reported:
    """What the replicas of the model would report."""

    def __init__(self) -> None:
        self._arriving = self._full = 0.0
        self._recent: deque[tuple[int, float, int]] = deque()  # (second, time to first token, how many)

    def waited(self, second: int, first_token_s: float, count: int) -> None:
        self._recent.append((second, first_token_s, count))

    def observation(self, second: int, serving: _Serving, arrived_tokens: float, needs_ttft: bool) -> Observation:
        self._arriving += (arrived_tokens - self._arriving) * (1 - math.exp(-1 / RATE_S))
        if serving.queued and serving.replicas:
            self._full = serving.full_rate()
        while self._recent and self._recent[0][0] < second - RECENT_S:
            self._recent.popleft()
        return Observation(
            now=float(second),
            replicas=serving.replicas,
            starting=serving.ordered - serving.replicas,
            running=serving.running,
            queued=serving.queued,
            queued_tokens=serving.queued_tokens,
            arriving_tokens_per_s=self._arriving,
            replica_tokens_per_s=self._full,
            ttft_p95_s=self._ttft_p95() if needs_ttft else 0.0,
            start_up_s=serving.fleet.start_up_s if serving.replicas else 0.0,
        )

    def _ttft_p95(self) -> float:
        by_time = sorted((seconds, count) for _, seconds, count in self._recent)
        rank = 0.95 * sum(count for _, count in by_time)
        for seconds, count in by_time:
            rank -= count
            if rank <= 0:
                return seconds
        return 0.0


def picture(result: Replay, output: Path) -> None:
    """Draw arrivals, replicas, queue and waits over time, as the kind of file ``output`` ends in (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib ({error}): pip install 'raymodels[plots]'") from error
    panels: list[tuple[str, dict[str, NDArray[Any]]]] = [
        ("requests/s", {"arriving": result.trace.requests, "refused": result.refused}),
        ("replicas", {"ordered": result.ordered, "answering": result.replicas}),
        ("requests queued", {"queued": result.queued}),
        ("longest wait, s", {"wait": result.longest_wait}),
    ]
    figure = Figure(figsize=(11, 9), layout="constrained")
    every = max(1, math.ceil(len(result.replicas) / COLUMNS))
    for (label, lines), axes in zip(panels, figure.subplots(len(panels), 1, sharex=True), strict=True):
        for name, values in lines.items():
            most = np.maximum.reduceat(values, np.arange(0, len(values), every))
            axes.plot(np.arange(len(most)) * every / 3600, most, drawstyle="steps-post", linewidth=1, label=name)
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(loc="upper right")
    axes.set_xlabel("hours")
    figure.suptitle(f"{result.trace.name}: the most of every {every} s")
    try:
        figure.savefig(output)
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write --out {output}: {error}; give a .png, .svg or .pdf in a folder") from error
