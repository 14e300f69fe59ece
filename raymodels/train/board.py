"""The run's scalars for TensorBoard, in the folder ``tensorboard`` of the run directory.

TensorBoard's writer appends a little at a time, which on an object store would rewrite the file each time. So there it
writes to a local folder, and each file is uploaded once, after `ROLL_SECONDS` or at the end.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from raymodels import storage

ROLL_SECONDS = 120.0
SCALARS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "model_flops_per_second")


class Board:
    """Charts reports over their steps."""

    def __init__(self, run: str) -> None:
        self._target = storage.join(run, "tensorboard")
        self._local = None if storage.is_local(run) else tempfile.TemporaryDirectory()
        self._open()

    def chart(self, report: dict[str, Any]) -> None:
        """Add a report's scalars.

        Raises:
            StorageError: files that ended were not uploaded; they are with the next ones.
            OSError: the local disk did not take it.
        """
        try:
            for name in SCALARS:
                if name in report:
                    self._writer.add_scalar(name, report[name], report["step"])
            for rank, held in enumerate(report["memory_bytes"]):
                self._writer.add_scalar(f"memory_bytes/rank{rank}", held, report["step"])
        except OSError:
            self._open()  # TensorBoard's writer does not recover from a disk that was full
            raise
        if time.monotonic() - self._opened > ROLL_SECONDS:
            self._writer.close()
            ended = self._files()
            self._open()
            self._upload(ended)

    def close(self) -> None:
        self._writer.close()
        self._upload(self._files())
        if self._local:
            self._local.cleanup()

    def _open(self) -> None:
        self._opened = time.monotonic() if self._local else float("inf")  # files on a disk need no roll
        self._writer = SummaryWriter(self._local.name if self._local else self._target)

    def _files(self) -> list[Path]:
        return list(Path(self._local.name).iterdir()) if self._local else []

    def _upload(self, files: list[Path]) -> None:
        for file in files:
            storage.copy_file(str(file), storage.join(self._target, file.name))
            file.unlink()
