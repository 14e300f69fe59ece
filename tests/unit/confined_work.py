"""What the workers of test_confined run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

MIB = 2**20


def work(data: bytes) -> bytes:
    """Does what the first word says."""
    what, _, rest = data.partition(b" ")
    return DOES[what.decode()](rest) or b""


def bound(first: str, second: str) -> Callable[[bytes], bytes]:
    """A function made of arguments."""
    return lambda data: f"{first} {second} ".encode() + data


def _spin(_: bytes) -> None:
    while True:
        pass


def _interval(rest: bytes) -> bytes:
    began = time.monotonic()
    time.sleep(float(rest))
    return f"{began} {time.monotonic()}".encode()


def _raise(rest: bytes) -> None:
    raise ValueError(rest)


def _overflow(_: bytes) -> None:
    comparing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    two = (ctypes.c_int * 2)()

    def sort_again(*_: object) -> int:
        ctypes.CDLL(None).qsort(two, 2, ctypes.sizeof(ctypes.c_int), comparing(sort_again))
        return 0

    sys.setrecursionlimit(10**9)
    sort_again()


DOES: dict[str, Callable[[bytes], bytes | None]] = {
    "echo": lambda rest: rest,
    "make": lambda rest: b"x" * (int(rest) * MIB),
    "pid": lambda _: f"{os.getpid()} {os.getppid()} {os.nice(0)}".encode(),
    "environment": lambda _: repr(os.environ).encode(),
    "print": lambda rest: print(rest.decode(), flush=True),
    "sleep": lambda rest: time.sleep(float(rest)),
    "interval": _interval,
    "spin": _spin,
    "raise": _raise,
    "overflow": _overflow,
    "abort": lambda _: os.abort(),
    "exit": lambda rest: os._exit(int(rest)),
    "end": lambda rest: os.kill(os.getpid(), int(rest)),
    "orphan": lambda _: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(60),
}
