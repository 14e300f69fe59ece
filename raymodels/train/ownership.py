"""One driver to a run directory: who trains it says so in ``owner/<n>.json``, which the next one creates exclusively.

An owner refreshes its file. One that has gone without releasing it, by a power cut or kill -9, counts as gone when its
process is not there any more (on this host) or when it has been silent for `SILENT_SECONDS` (on another). An owner that
was silent for so long, and comes back to find a successor, is told.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from raymodels import storage
from raymodels.errors import AlreadyExists, RunInUse, StorageError

REFRESH_SECONDS = 20.0
SILENT_SECONDS = 120.0


class Owner:
    """Owns a run directory from entering to leaving.

    Args:
        on_replaced: is called in a thread, again and again, once another owner has taken over.

    Raises:
        RunInUse: another driver does; names its host, process and since when.
    """

    def __init__(self, run: str, on_replaced: Callable[[], None] = lambda: None) -> None:
        self._run, self._folder, self._on_replaced = run, storage.join(run, "owner"), on_replaced
        self._over = threading.Event()

    def __enter__(self) -> Self:
        numbers = self._numbers()
        if numbers:
            last: dict[str, Any] = storage.read_json(self._place(numbers[-1]))
            if not last["released"] and _alive(last):
                raise self._in_use(last)
        self._number = (numbers or [0])[-1] + 1
        me = psutil.Process()
        self._me = {"host": socket.gethostname(), "pid": me.pid, "born": _born(me), "since": time.time()}
        try:
            storage.create(self._place(self._number), self._content(released=False))
        except AlreadyExists:
            found: dict[str, Any] = storage.read_json(self._place(self._number))
            if not self._me.items() <= found.items():  # else it is ours: the answer got lost, and it was sent again
                raise self._in_use(found) from None
        for number in numbers[:-1]:  # somebody may be reading the last
            storage.delete(self._place(number))
        self._refresher = threading.Thread(target=self._refresh, daemon=True)
        self._refresher.start()
        return self

    def confirm(self) -> None:
        """Only go on where nobody else has taken over.

        Raises:
            RunInUse: somebody has.
        """
        if max(self._numbers(), default=0) > self._number:  # none: the folder has just gone
            raise self.replaced()

    def replaced(self) -> RunInUse:
        """The error of an owner that another has replaced."""
        return self._in_use(storage.read_json(self._place(self._numbers()[-1])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._refresher.join()
        storage.write_bytes(self._place(self._number), self._content(released=True))

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            try:
                storage.write_bytes(self._place(self._number), self._content(released=False))
                if max(self._numbers(), default=0) > self._number:  # none: the folder has just gone
                    self._on_replaced()
            except StorageError:
                continue  # the next refresh is early enough

    def _numbers(self) -> list[int]:
        names = storage.list_names(self._folder)  # a write that was cut short leaves others
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"(\d{8})\.json", name)))

    def _content(self, released: bool) -> bytes:
        return storage.to_json({**self._me, "seen": time.time(), "released": released})

    def _place(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")

    def _in_use(self, owner: dict[str, Any]) -> RunInUse:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return RunInUse(
            f"{self._run} is being trained by process {owner['pid']} on {owner['host']} since {since}: "
            "wait for it or stop it, or give this run another run.name"
        )


def _alive(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return bool(time.time() - owner["seen"] < SILENT_SECONDS)
    try:
        process = psutil.Process(owner["pid"])
        same = abs(_born(process) - owner["born"]) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _born(process: psutil.Process) -> float:
    """When a process of this host began, in seconds since the host did: a wall clock that is set moves neither."""
    return float(process.create_time() - psutil.boot_time())
