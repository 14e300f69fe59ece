"""What a worker measures of itself: start-up phases, throughput, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds per named phase, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
