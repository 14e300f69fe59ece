"""The run's record: events.jsonl, and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from raymodels import storage

Event = dict[str, Any]

SCALARS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "model_flops_per_second")


class Events:
    """Appends events to a run directory and passes them on; the end and its cause are recorded on leaving."""

    def __init__(self, run: str, on_event: Callable[[Event], None] | None) -> None:
        self._file = storage.join(run, "events.jsonl")
        self._board = SummaryWriter(storage.join(run, "tensorboard"))
        self._on_event = on_event

    def __call__(self, event: Event) -> None:
        event = {"time": round(time.time(), 3), **event}
        storage.append(self._file, (json.dumps(event) + "\n").encode())
        if event["kind"] == "report":
            self._chart(event)
        if self._on_event:
            self._on_event(event)

    def _chart(self, report: Event) -> None:
        for name in SCALARS:
            if name in report:
                self._board.add_scalar(name, report[name], report["step"])
        for rank, held in enumerate(report["memory_bytes"]):
            self._board.add_scalar(f"memory_bytes/rank{rank}", held, report["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self({"kind": "failed", "error": kind.__name__, "message": str(error)})
        self._board.close()
