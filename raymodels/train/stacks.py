"""The Python stack of another process of this node, and what it tells. py-spy reads it, also of a stopped process."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRIES, TRY_SECONDS = 3, 5.0

# Files whose functions wait for other ranks, and modules that compile.
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "ray/train/v2/api/train_fn_utils.py")
_COMPILERS = ("torch/_dynamo/", "torch/_inductor/", "torch/utils/cpp_extension.py", "/triton/")
_AWAITED = ("/torch/", "/deepspeed/")
# The standard library and what is installed beside it, but for this package.
_LIBRARY = re.compile(r"^<frozen |/lib(64)?/python3[\d.]*/(?!(site|dist)-packages/raymodels/)")
_AUTOGRAD = "torch/autograd/"


@dataclass(frozen=True)
class Stack:
    """A process's training thread, innermost frame first, as lines ``function (file:line)``.

    Args:
        waits: inside a collective, or in a backward pass whose own thread is.
        compiles: inside a compiler.
        problem: why there are no lines.
    """

    lines: tuple[str, ...] = ()
    waits: bool = False
    compiles: bool = False
    problem: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.lines) or f"(no stack: {self.problem})"

    @property
    def head(self) -> str:
        """In one line: the innermost frame, and the innermost that is not a library's."""
        own = next((line for line in self.lines if not _is_library(line.partition(" (")[2])), None)
        if not self.lines:
            return self.text
        return self.lines[0] if own in (None, self.lines[0]) else f"{self.lines[0].split()[0]} of {own}"


def dump(pid: int, thread: int) -> Stack:
    """The stack of one thread of a Python process of this node.

    The process is not paused, since one that is stopped already could not be. A busy one may be read while it changes,
    so this tries more than once.

    Args:
        thread: its native id.
    """
    problem = ""
    for _ in range(TRIES):
        try:
            answer = subprocess.run(
                [_py_spy(), "dump", "--json", "--nonblocking", "--full-filenames", "--pid", str(pid)],
                capture_output=True,
                timeout=TRY_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Stack(problem=f"py-spy took over {TRY_SECONDS:g} s")
        except OSError as error:
            return Stack(problem=f"py-spy did not start: {error}")
        if answer.returncode == 0:
            return read(json.loads(answer.stdout), thread)
        problem = answer.stderr.decode(errors="replace").strip().replace("\n", "; ")
        time.sleep(0.05)
    return Stack(problem=problem)


def read(threads: list[dict[str, Any]], thread: int) -> Stack:
    """The stack of ``thread`` in what ``py-spy dump --json`` printed."""
    frames = next((found["frames"] for found in threads if found["os_thread_id"] == thread), None)
    if not frames:
        return Stack(problem=f"py-spy saw no Python frames of thread {thread}")
    files = [frame["filename"] for frame in frames]
    waits = _any_in(files, _COLLECTIVES) or _awaits_handle(frames[0])
    if _AUTOGRAD in files[0]:  # the backward pass of GPUs calls its hooks in threads of its own
        waits |= any(_any_in([frame["filename"] for frame in other["frames"]], _COLLECTIVES) for other in threads)
    lines = tuple(f"{frame['name']} ({frame['filename']}:{frame['line']})" for frame in frames)
    return Stack(lines, waits, _any_in(files, _COMPILERS))


def _is_library(file: str) -> bool:
    """Whether a file is neither the user's nor this package's, wherever that is installed."""
    return _LIBRARY.search(file) is not None


def _awaits_handle(innermost: dict[str, Any]) -> bool:
    """Whether it waits for a collective that was started before."""
    file = innermost["filename"]
    return _is_library(file) and _any_in([file], _AWAITED) and innermost["name"].rpartition(".")[2] == "wait"


def _any_in(files: list[str], parts: tuple[str, ...]) -> bool:
    return any(part in file for file in files for part in parts)


def _py_spy() -> str:
    return str(Path(sysconfig.get_path("scripts")) / "py-spy")
