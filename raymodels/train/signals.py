"""How a running worker group is asked to save and leave; or, where another driver has taken over, to leave alone.

The driver puts a file into the run directory, which reaches every host; rank 0 looks for it in the background, and the
ranks agree on leaving in the collective that they do at every step anyway. Ray's notice of a preemption comes to each
rank by itself and is agreed on in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, get_args

import torch.distributed as dist

from raymodels import storage
from raymodels.errors import StorageError

Reason = Literal["replaced", "preempted", "terminated", "resized"]
REASONS: tuple[Reason, ...] = get_args(Reason)  # the first that any rank has heard counts
POLL_SECONDS = 1.0
FOLDER = "requests"


def request(run: str, attempt: int, reason: Reason) -> None:
    """Ask the workers of an attempt to save and leave."""
    storage.write_bytes(storage.join(run, FOLDER, f"{attempt}-{reason}"), b"")


def forget(run: str) -> None:
    """Remove what earlier attempts were asked."""
    storage.delete(storage.join(run, FOLDER))


class Signals:
    """One rank's ear. ``preempted`` tells whether this rank has had notice of a preemption."""

    def __init__(self, run: str, attempt: int, preempted: Callable[[], bool] = lambda: False) -> None:
        self._place, self._attempt, self._preempted = storage.join(run, FOLDER), attempt, preempted
        self._heard: set[Reason] = set()
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def heard(self) -> Reason | None:
        """Why this rank would leave now: of several reasons the first of `REASONS`."""
        heard = self._heard | {"preempted"} if self._preempted() else self._heard
        return next((reason for reason in REASONS if reason in heard), None)

    def _listen(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                names = storage.list_names(self._place)
            except StorageError:
                continue  # asked again in a second; saving will say what is wrong with the storage
            self._heard |= {reason for reason in REASONS if f"{self._attempt}-{reason}" in names}

    def __enter__(self) -> Self:
        if dist.get_rank() == 0:
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
