"""What a worker measures of itself: start-up phases, throughput, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from raymodels.train.heartbeat import Heart

# How a worker's phases appear in the run's ledger, and what its heart calls them, where that differs.
KINDS = {
    "worker_start": "scheduling",
    "imports": "start",
    "model": "start",
    "engine": "start",
    "first_step": "compile",
    "weigh": "step",
    "settle": "step",
    "report": "other",
}
START_UP = ("worker_start", "imports", "data", "model", "engine", "restore")
MARKS = {"imports": "start", "model": "start", "engine": "start", "first_step": "step", "blocked_by_save": "save"}


class Phases:
    """Where a rank's seconds go, by named phase; a phase within a phase counts for the inner one alone.

    Args:
        heart: is told of every phase that is entered, also again when an inner one ends.
    """

    step: int | None = None  # that the loop is at

    def __init__(self, heart: Heart | None = None) -> None:
        self._all: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []
        self._heart = heart
        self._since = time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Seconds that passed before this was made."""
        self._all[name] = self._seconds[name] = seconds
        self._since -= seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[], float]]:
        """Time a phase; yields what tells its seconds after it has ended."""
        start = time.perf_counter()
        self._open.append((name, 0.0))
        self._mark(name)
        taken = [0.0]
        yield lambda: taken[0]
        whole = time.perf_counter() - start
        _, within = self._open.pop()
        taken[0] = whole
        for seconds in (self._seconds, self._all):
            seconds[name] = seconds.get(name, 0.0) + whole - within
        if self._open:
            outer, before = self._open[-1]
            self._open[-1] = (outer, before + whole)
            self._mark(outer)

    def start_up(self) -> dict[str, float]:
        """The seconds of each phase of the start-up; to be asked for after the first step."""
        taken = {name: self._all.get(name, 0.0) for name in START_UP}
        return taken | {"first_step": sum(self._all.values()) - sum(taken.values())}

    def where(self) -> str:
        """The step and phase that a rank is at, in words."""
        step = "before the first step" if self.step is None else f"step {self.step + 1}"
        return f"{step}, phase {self._open[-1][0]}" if self._open else step

    def going_on(self) -> None:
        """Tell the heart that the phase makes progress."""
        if self._open:
            self._mark(self._open[-1][0])

    def own(self) -> AbstractContextManager[None]:
        """Around work that waits for no other rank."""
        return self._heart.own(cuda=torch.cuda.is_available()) if self._heart else nullcontext()

    def _mark(self, name: str) -> None:
        if self._heart:
            self._heart.at(MARKS.get(name, name), self.step)

    def take(self) -> dict[str, float]:
        """The seconds by kind of the ledger since the last call, or the start; what no phase saw is other."""
        now = time.perf_counter()
        taken: dict[str, float] = {}
        for name, seconds in self._seconds.items():
            kind = KINDS.get(name, name)
            taken[kind] = taken.get(kind, 0.0) + seconds
        unseen = max(0.0, now - self._since - sum(taken.values()))
        taken["other"] = taken.get("other", 0.0) + unseen
        self._seconds, self._since = {}, now
        return taken


class Timed:
    """What a timed step did: its target ``tokens``, over all ranks."""

    tokens = 0


class Meter:
    """Throughput of optimizer steps since the last reading, over all ranks. Time spent elsewhere does not count."""

    def __init__(self, flops_per_token: float) -> None:
        self._flops_per_token = flops_per_token
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    @contextmanager
    def step(self) -> Iterator[Timed]:
        """Time one optimizer step; the caller fills in its tokens."""
        start, timed = time.perf_counter(), Timed()
        yield timed
        self._seconds += time.perf_counter() - start
        self._tokens += timed.tokens
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last call."""
        rate = self._tokens / self._seconds
        reading = {
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self._flops_per_token,
            "step_seconds": self._seconds / self._steps,
        }
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return reading


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: on the GPU, or as a process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
