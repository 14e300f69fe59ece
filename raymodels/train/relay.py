"""Bring the workers' reports to the driver while `TorchTrainer.fit` blocks it.

Ray Train calls back in its controller process, which it pins to the driver's host; so a local file between the two is
enough: the controller appends lines, a thread of the driver reads them.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

POLL_SECONDS = 0.2
MEMORIES = 64

Event = dict[str, Any]


class Relay(UserCallback):  # type: ignore[misc]
    """Runs in the controller: one line a report, rank 0's metrics with the memory of all ranks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[Event], checkpoint: Checkpoint | None) -> None:
        first = dict(metrics[0])
        first["memory_bytes"] = fullest([rank["memory_bytes"] for rank in metrics])
        with self._path.open("a") as file:
            file.write(json.dumps(first) + "\n")


def fullest(held: list[int]) -> list[int]:
    """What each rank has held; of more than `MEMORIES` ranks the most of each of so many groups of neighbours.

    A run's record would otherwise grow with the ranks: at 8,000 of them by gigabytes a month.
    """
    size = -(-len(held) // MEMORIES)
    return [max(held[first : first + size]) for first in range(0, len(held), size)]


@contextmanager
def relay(on_report: Callable[[Event], None]) -> Iterator[Relay]:
    """A `Relay` for a trainer, whose reports reach ``on_report`` in a thread of this process, all by the end.

    What ``on_report`` raises is raised again at the end.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        path = Path(folder) / "reports.jsonl"
        path.touch()
        finished = threading.Event()
        reader = pool.submit(_follow, path, finished, on_report)
        try:
            yield Relay(path)
        finally:
            finished.set()
        reader.result()


def _follow(path: Path, finished: threading.Event, on_report: Callable[[Event], None]) -> None:
    with path.open() as file:
        begun = ""
        while True:
            ending = finished.is_set()  # asked before reading, so that the last lines are read after it
            while piece := file.readline():
                begun += piece
                if begun.endswith("\n"):  # else its writer is in the midst of it
                    on_report(json.loads(begun))
                    begun = ""
            if ending:
                return
            finished.wait(POLL_SECONDS)
