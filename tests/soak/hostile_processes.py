"""The processes of the soak: the clients' own, which say what they find line by line, and the endpoint's, watched."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from tests.soak.hostile_requests import is_big

ROOT = Path(__file__).parents[2]
LIMIT = 4 << 30
"""Bytes of a process of the endpoint with those that it has started: of a container around them."""
LOOK_S = 0.2
FOUND_S = 2.0


class Other:
    """A client in a process of its own, until the end of the context."""

    def __init__(self, module: str, told: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        self.lines = list[dict[str, Any]]()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def at_least(self, count: int, deadline: float = float("inf"), big: int = 0) -> None:
        """Return when it has told of so many requests, so many of them big, or at the deadline (`time.monotonic`)."""
        while not self._enough(count, big) and time.monotonic() < deadline:
            assert self._process.poll() is None, "a client has died"
            time.sleep(0.05)

    def _enough(self, count: int, big: int) -> bool:
        return len(self.lines) >= count and sum(is_big(line.get("number", 1)) for line in self.lines) >= big

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reading.join()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))


class Role:
    """A process of the endpoint by what it does, whichever one does it at the time."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self._title = name, title
        self.seen = set[psutil.Process]()
        """All that did it; equal if they have process id and start time in common."""
        self.ended = set[psutil.Process]()
        """Of those, the ones that run no more."""
        self.most = 0
        self.killed = list[float]()
        """When it, or one that it had started, was over `LIMIT`, in Unix seconds."""
        self._now: psutil.Process | None = None

    def find(self) -> None:
        """Look for the one that does it now."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith(self._title):
                    self._now = process
                    self.seen.add(process)
        self.ended = {process for process in self.seen if not process.is_running()}

    def family(self) -> list[psutil.Process]:
        """It and all that it has started."""
        if self._now is None:
            return []
        with suppress(psutil.Error):
            return [self._now, *self._now.children(recursive=True)]
        return []

    def look(self) -> None:
        """Note how much memory it has, and kill what has too much."""
        held = dict[psutil.Process, int]()
        for process in self.family():
            with suppress(psutil.Error):
                held[process] = process.memory_info().rss
        self.most = max(self.most, sum(held.values()))
        if sum(held.values()) > LIMIT:
            max(held, key=held.__getitem__).kill()
            self.killed.append(time.time())

    def memory(self) -> int:
        """Bytes; what several processes share is divided among them."""
        total = 0
        for process in self.family():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total


class Watch:
    """Looks at the endpoint's processes again and again."""

    def __init__(self, roles: list[Role]) -> None:
        self.roles = roles
        self._stop = threading.Event()

    def memory(self) -> dict[str, int]:
        return {role.name: role.memory() for role in self.roles}

    def _look(self) -> None:
        found = 0.0
        while not self._stop.wait(LOOK_S):
            if time.monotonic() > found + FOUND_S:
                found = time.monotonic()
                for role in self.roles:
                    role.find()
            for role in self.roles:
                role.look()


@contextmanager
def watched(roles: list[Role]) -> Iterator[Watch]:
    watch = Watch(roles)
    for role in roles:
        role.find()
        assert role.seen, f"there is no process of the {role.name}"
    looking = threading.Thread(target=watch._look, daemon=True)
    looking.start()
    try:
        yield watch
    finally:
        watch._stop.set()
        looking.join()
