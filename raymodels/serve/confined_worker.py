"""The worker's side of `confined`: imports a function, then forks for every call, under limits of time and memory.

python -m raymodels.serve.confined_worker PARENT_PID PACKAGE.MODULE:FUNCTION MEMORY_BYTES [ARGUMENT...]
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from struct import Struct

CALL = Struct("<Qd")
"""Before a call's data: its size in bytes, and seconds of processor time."""
ANSWER = Struct("<BQ")
"""Before an answer: its status, and its size in bytes."""
NICENESS = 5
"""Added to the server's: what is large may wait for what is small."""
STACK = 2**20
"""Bytes; less than any thread has, so that what passes here does not overflow a stack elsewhere."""
PR_SET_PDEATHSIG = 1

Function = Callable[[bytes], bytes]


class Status(IntEnum):
    """How a call ended."""

    DONE = 0
    TOO_LONG = 1
    TOO_LARGE = 2
    FAILED = 3


def main(parent: int, target: str, memory_bytes: int, *arguments: str) -> None:
    """Serve calls until the parent closes the socket or ends."""
    _die_with(parent)
    pipe = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints is for the log
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a client's data
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if arguments:
        function = function(*arguments)
    pipe.sendall(b"\0")
    while len(head := pipe.recv(CALL.size, socket.MSG_WAITALL)) == CALL.size:
        size, seconds = CALL.unpack(head)
        data = pipe.recv(size, socket.MSG_WAITALL) if size else b""
        if len(data) < size:
            return
        _call(pipe, function, data, seconds, memory_bytes)
        del data


def _call(pipe: socket.socket, function: Function, data: bytes, seconds: float, memory_bytes: int) -> None:
    answering = mmap.mmap(-1, 1)  # shared with the fork
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _die_with(me)
            status, answer = _limited(function, data, seconds, memory_bytes)
            answering[0] = 1
            pipe.sendall(ANSWER.pack(status, len(answer)))
            pipe.sendall(answer)
            os._exit(0)
        finally:
            os._exit(1)
    _, ended = os.waitpid(pid, 0)
    if answering[0]:
        assert ended == 0, "half an answer has been sent"
        return
    status, why = _cause(ended)
    pipe.sendall(ANSWER.pack(status, len(why)) + why)


def _limited(function: Function, data: bytes, seconds: float, memory_bytes: int) -> tuple[Status, bytes]:
    most = allocated() + memory_bytes
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal's default ends the process, whatever it is at
    try:
        return Status.DONE, function(data)
    except MemoryError:
        return Status.TOO_LARGE, b""
    except BaseException as error:  # a panic of Rust's is no Exception
        return Status.FAILED, type(error).__name__.encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _cause(ended: int) -> tuple[Status, bytes]:
    """Of the end of a process that has not answered, as `os.waitpid` tells it."""
    if os.WIFEXITED(ended):
        return Status.FAILED, f"exit code {os.WEXITSTATUS(ended)}".encode()
    ended_by = os.WTERMSIG(ended)
    if ended_by == signal.SIGPROF:
        return Status.TOO_LONG, b""
    if ended_by in (signal.SIGABRT, signal.SIGKILL):  # Rust and C++ abort where memory is refused; the kernel kills
        return Status.TOO_LARGE, b""
    return Status.FAILED, signal.Signals(ended_by).name.encode()


def allocated() -> int:
    """Bytes that RLIMIT_DATA counts now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [data] = [line for line in lines if line.startswith("VmData:")]
    return int(data.split()[1]) * 1024


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had died before
        os._exit(1)


if __name__ == "__main__":
    _, parent_pid, name, memory, *rest = sys.argv
    main(int(parent_pid), name, int(memory), *rest)
