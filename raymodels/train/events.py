"""Where a run's events go: its journal, its ledger, TensorBoard, Prometheus, and whoever watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from raymodels import storage
from raymodels.errors import StorageError
from raymodels.journal import Journal, read
from raymodels.ledger import Account, Ledger
from raymodels.train import gauges
from raymodels.train.board import Board

Event = dict[str, Any]


class Events:
    """Takes a driver's events, from any thread. Leaving it by an error records that as ``failed``, if nobody has.

    Storage that fails does not end the training: events wait in memory for the next one, and for the end.
    """

    def __init__(self, run: str, on_event: Callable[[Event], None] | None) -> None:
        self._name = storage.name(run)
        self._on_event = on_event
        self._lock = threading.RLock()
        self._ledger, self._driver = Ledger(), 1
        for event in read(run).events:
            self._ledger.add(event)
            self._driver = max(self._driver, event.get("driver", 0) + 1)
        self._journal = Journal(run)
        self._board = Board(run)
        self._failed = self._warned = self._uncharted = False

    def __call__(self, event: Event) -> None:
        with self._lock:
            event = {"time": round(time.time(), 3), "driver": self._driver, **event}
            self._ledger.add(event)
            self._write(event)
            if event["kind"] == "report":
                self._chart(event)
            gauges.show(self._name, event, self.account)
            if event["kind"] in ("started", "failed"):
                self._failed = event["kind"] == "failed"
            if self._on_event:
                self._on_event(event)

    @property
    def account(self) -> Account:
        """Of the whole run so far, with what earlier drivers recorded."""
        with self._lock:
            return self._ledger.account()

    @property
    def attempt(self) -> int:
        """The number of the newest attempt of the run; 0 before the first."""
        attempts = self.account.attempts
        return attempts[-1].number if attempts else 0

    def _write(self, event: Event) -> None:
        try:
            self._journal.append(event)
            self._warned = False
        except StorageError as error:
            if not self._warned and self._on_event:
                self._on_event({"kind": "notice", "text": f"{error}: training goes on, its events wait in memory"})
            self._warned = True

    def _chart(self, report: Event) -> None:
        try:
            self._board.chart(report)
            self._uncharted = False
        except (OSError, StorageError) as error:
            if not self._uncharted and self._on_event:
                self._on_event({"kind": "notice", "text": f"TensorBoard's charts: {error}; training goes on"})
            self._uncharted = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._failed:
            self({"kind": "failed", "error": kind.__name__, "message": str(error), "retry": False})
        try:
            self._journal.flush()
            self._board.close()
        except (OSError, StorageError):
            if error is None:  # else the run's own error is the one to show
                raise
