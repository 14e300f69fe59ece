"""A run's events as files: appended by its driver as they happen, read by anyone.

On a disk they are the lines of ``events.jsonl``. An object store cannot append, so there they are the lines of the
objects ``events/000001.jsonl``, ``events/000002.jsonl`` and so on: the newest is rewritten until it is full, so that a
long run writes at most `FULL` bytes an event. A driver begins an object of its own.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raymodels import storage

Event = dict[str, Any]

FILE, FOLDER = "events.jsonl", "events"
FULL = 32 << 10
READERS = 8


class Journal:
    """Appends events to a run directory. One writer; not for several threads at once."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._local = storage.is_local(run)
        self._waiting = b""  # what the storage has not taken yet
        self._object = b""  # what the newest object holds
        self._number = 0
        self._unsure = True  # a driver that was killed, or a full disk, may have left a part of a line

    def append(self, event: Event) -> None:
        """Write an event, with all that earlier failures kept waiting.

        Raises:
            StorageError: the storage did not take it; it waits for the next call.
        """
        self._waiting += (json.dumps(event) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            StorageError: as in `append`.
        """
        if not self._waiting:
            return
        if self._local:
            self._append_line()
        else:
            self._put()
        self._waiting = b""

    def _append_line(self) -> None:
        file = storage.join(self._run, FILE)
        lines = b"\n" + self._waiting if self._unsure and _is_torn(file) else self._waiting
        self._unsure = True
        storage.append(file, lines)
        self._unsure = False

    def _put(self) -> None:
        content = self._object + self._waiting
        if self._object and len(content) <= FULL:
            storage.write_bytes(self._place(self._number), content)
        else:
            names = storage.list_names(storage.join(self._run, FOLDER))
            number = max([self._number, *(int(name.partition(".")[0]) for name in names)]) + 1
            content = self._waiting
            storage.create(self._place(number), content)
            self._number = number
        self._object = content

    def _place(self, number: int) -> str:
        return storage.join(self._run, FOLDER, f"{number:06}.jsonl")


@dataclass(frozen=True)
class Record:
    """A run's events in their order, and a sentence on each line that is none."""

    events: list[Event]
    damaged: list[str]


def read(run: str) -> Record:
    """Everything that a run has recorded.

    A last line that its writer has not ended yet is left out. Lines that are no events are named, not hidden.

    Raises:
        StorageError: the record cannot be read.
    """
    record = Record([], [])
    places = [storage.join(run, FOLDER, name) for name in storage.list_names(storage.join(run, FOLDER))]
    if storage.exists(whole := storage.join(run, FILE)):
        places.append(whole)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(storage.read_bytes, places))
    for place, content in zip(places, contents, strict=True):
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                _take(line, record)
            except ValueError as error:
                if number < len(lines):  # else the writer is in the midst of it, or was killed there
                    record.damaged.append(f"{place} line {number}: {error}")
    return record


def _is_torn(file: str) -> bool:
    """Whether a local file ends in the midst of a line."""
    if not storage.exists(file):
        return False
    with storage.open_file(file) as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 1))
        return content.read(1) not in (b"", b"\n")


def _take(line: bytes, record: Record) -> None:
    if not line.strip():
        return
    try:
        event = json.loads(line)
    except ValueError:
        raise ValueError(f"not JSON, or cut off: {line[:40].decode(errors='replace')}") from None
    if not isinstance(event, dict) or not isinstance(event.get("time"), int | float) or "kind" not in event:
        raise ValueError(f"no event: {line[:40].decode(errors='replace')}")
    record.events.append(event)
