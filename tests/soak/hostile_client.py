"""Clients that send the hostile requests of a seed one after the other, each on a connection of its own.

A process beside the endpoint's: what it is to do comes as one line of JSON on its stdin, each outcome goes as one to
its stdout, and it goes on until stdin ends.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.soak.hostile_requests import case
from tests.soak.hostile_wire import Case, Piece

NICENESS = 19
"""It leaves the cores to what is measured: a client of a real attack has its own."""
SENT_AT_ONCE = 1 << 18
PAUSE_S = 0.5
"""Where nobody listens: until a gateway that has died is back."""
KEPT = 1 << 16
"""Bytes at the beginning and at the end of an answer that are looked at."""
RESET = struct.pack("ii", 1, 0)
"""Of `SO_LINGER`: what is closed is reset, as when the client's machine has gone."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class Outcome:
    number: int
    kind: str
    start_unix_s: float
    seconds: float = 0.0
    sent: int = 0
    ended: str = ""
    """``answered``, ``closed`` without an answer, ``left`` by the client, ``open`` for longer than it may be, or
    ``not connected``."""
    status: int = 0
    code: str = ""
    """Of the error that was answered, or with which a stream ended."""
    plain: bool = False
    """Whether it was an error that is not in the protocol's shape."""
    error_bytes: int = 0


@dataclass
class Answer:
    """What comes back, of which the beginning and the end are kept."""

    start: bytearray = field(default_factory=bytearray)
    end: bytearray = field(default_factory=bytearray)
    size: int = 0
    over: bool = False
    """The server has closed the connection."""

    def add(self, received: bytes) -> None:
        self.size += len(received)
        self.start += received[: KEPT - len(self.start)]
        self.end = (self.end + received)[-KEPT:]

    @property
    def head(self) -> bytes:
        """The status line and the headers, with the line end of the last; empty until they are there."""
        told = self.start
        while told.startswith(b"HTTP/1.1 1") and b"\r\n\r\n" in told:  # 100 Continue
            told = told.partition(b"\r\n\r\n")[2]
        found, end, _ = told.partition(b"\r\n\r\n")
        return bytes(found) + b"\r\n" if end else b""

    @property
    def whole(self) -> bool:
        if self.over:
            return True
        if not (head := self.head):
            return False
        length = LENGTH.search(head)
        if length is None:
            return b"chunked" in head.lower() and self.end.endswith(b"0\r\n\r\n")
        return self.size >= self.start.index(head) + len(head) + 2 + int(length[1])


class Client:
    """Sends a case and sees how it ends."""

    def __init__(self, connection: socket.socket, asked: Case, longest_s: float) -> None:
        self._socket, self._case = connection, asked
        self._start = time.monotonic()
        leave = longest_s if asked.leave_after_s is None else asked.leave_after_s
        self._until = self._start + leave
        self.sent, self.answer = 0, Answer()

    def run(self) -> str:
        """How it ended."""
        self._socket.setblocking(False)
        with suppress(OSError):  # the server has closed the connection, or reset it
            for piece in self._case.pieces():
                self._send(piece)
                if self._over():
                    break
            else:
                if self._case.half_close:
                    self._socket.shutdown(socket.SHUT_WR)
            while not self._over():
                self._wait(self._left())
        if self.answer.head and (self.answer.whole or self._left()):
            return "answered"
        if self._left():
            return "closed"
        return "open" if self._case.leave_after_s is None else "left"

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _over(self) -> bool:
        return self.answer.whole or self._left() == 0

    def _send(self, piece: Piece) -> None:
        if isinstance(piece, float):
            self._wait(min(piece, self._left()))
            return
        rest = memoryview(piece)
        while rest and not self._over():
            if self._wait(self._left(), writing=True):
                gone = self._socket.send(rest[:SENT_AT_ONCE])
                self.sent, rest = self.sent + gone, rest[gone:]

    def _wait(self, seconds: float, writing: bool = False) -> bool:
        """Take what comes in this time; whether something can be sent, which ends the wait."""
        connection = [self._socket]
        readable, writable, _ = select.select(connection, connection if writing else [], [], seconds)
        if readable:
            received = self._socket.recv(SENT_AT_ONCE)
            self.answer.add(received)
            self.answer.over = not received
        return bool(writable)


def attack(host: str, port: int, asked: Case, longest_s: float) -> Outcome:
    """Send a case; how it ended."""
    outcome = Outcome(asked.number, asked.kind, time.time())
    start = time.monotonic()
    try:
        connection = socket.create_connection((host, port), timeout=longest_s)
    except OSError:
        outcome.ended = "not connected"
        time.sleep(PAUSE_S)
    else:
        with connection, idle(host, port, asked.beside):
            client = Client(connection, asked, longest_s)
            outcome.ended, outcome.sent = client.run(), client.sent
            if outcome.ended == "left" and outcome.number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        judge(outcome, client.answer)
    outcome.seconds = time.monotonic() - start
    return outcome


@contextmanager
def idle(host: str, port: int, count: int) -> Iterator[None]:
    """So many connections, or as many as are taken."""
    with ExitStack() as opened:
        with suppress(OSError):
            for _ in range(count):
                opened.enter_context(socket.create_connection((host, port), timeout=1))
        yield


def judge(outcome: Outcome, answer: Answer) -> None:
    """Read status and error from what came."""
    if not (head := answer.head):
        return
    with suppress(ValueError, IndexError):
        outcome.status = int(head.split(b" ", 2)[1])
    end = bytes(answer.end)
    if outcome.status == 200:
        if b"text/event-stream" in head.lower() and (at := end.rfind(b'data: {"error":')) >= 0:
            outcome.code = _error(end[at + 6 :].partition(b"\n")[0]).get("code") or ""
    elif outcome.status >= 400:
        content = bytes(answer.start).partition(head + b"\r\n")[2]
        if length := LENGTH.search(head):
            content = content[: int(length[1])]  # of the first of several
        error = _error(content)
        outcome.code, outcome.plain = error.get("code") or "", not error and bool(content)
        outcome.error_bytes = len(head) + len(content)


def _error(content: bytes) -> dict[str, Any]:
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(content)["error"]
        return found if isinstance(found, dict) and "message" in found else {}
    return {}


def attacks(told: Mapping[str, Any], enough: threading.Event) -> None:
    """Start all clients; they go on until there have been enough."""
    numbers, keys, printing = itertools.count(told["first"]), dict[str, str](told["keys"]), threading.Lock()

    def one_after_the_other() -> None:
        while not enough.is_set():
            asked = case(told["seed"], next(numbers), keys)
            outcome = attack(told["host"], told["port"], asked, told["longest_s"])
            with printing:
                print(json.dumps(asdict(outcome)), flush=True)

    for _ in range(told["clients"]):
        threading.Thread(target=one_after_the_other, daemon=True).start()


def main() -> int:
    os.nice(NICENESS - os.nice(0))
    told, enough = json.loads(sys.stdin.readline()), threading.Event()
    attacks(told, enough)
    sys.stdin.read()
    enough.set()
    return 0


if __name__ == "__main__":
    sys.exit(main())
