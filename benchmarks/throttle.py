"""Slow storage for benchmarks: in this process what is written goes through one pipe of so many bytes a second.

Both ways that a checkpoint takes to disk are throttled alike: raymodels' files and DeepSpeed's ``torch.save``.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import IO, Any

import torch

from raymodels import storage

PIECE = 1 << 16


class Pipe:
    """Lets ``bytes_per_second`` through, over all threads of this process."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._free, self._lock = bytes_per_second, 0.0, threading.Lock()

    def carry(self, size: int) -> None:
        """Return when so many bytes have gone through."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            free = self._free
        time.sleep(max(0.0, free - time.monotonic()))


class Throttled:
    """A file opened for writing, at the end of a pipe."""

    def __init__(self, file: IO[Any], pipe: Pipe) -> None:
        self._file, self._pipe = file, pipe

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._pipe.carry(len(piece))
            self._file.write(piece)
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Throttled:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def throttle(bytes_per_second: float) -> None:
    """From now on this process writes no faster than that."""
    pipe = Pipe(bytes_per_second)
    open_file, write_beside, save = storage.open_file, storage._write_beside, torch.save

    def slow_open(uri: str, mode: str = "rb") -> Any:
        file = open_file(uri, mode)
        return file if "r" in mode else Throttled(file, pipe)

    def slow_beside(path: Path, data: bytes) -> Path:
        pipe.carry(len(data))
        return write_beside(path, data)

    def slow_save(value: Any, place: Any, *rest: Any, **options: Any) -> None:
        with Path(place).open("wb") as file:
            save(value, Throttled(file, pipe), *rest, **options)

    storage.open_file, storage._write_beside = slow_open, slow_beside
    torch.save = slow_save  # type: ignore[assignment]
