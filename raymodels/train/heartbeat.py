"""Where a worker is, told to other processes of its node: one small memory-mapped file per rank.

A worker marks every phase as it enters it, which costs about a microsecond and no system call but reading the clock. A
thread ticks beside it, so that a process that stands still differs from one that is busy. `watch` reads the files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

# In the order in which a step goes through them. "weigh" is the all-reduce of the global batch's weight, "step" the
# forward and backward passes and the optimizer, "settle" the wait for a GPU to finish what was started on it.
PHASES = (
    "start",
    "restore",
    "data",
    "weigh",
    "step",
    "settle",
    "evaluation",
    "save",
    "report",
    "ending",
)
STEPPING = frozenset({"data", "weigh", "step", "settle"})  # what counts as time of a step
_NUMBERS = {name: number for number, name in enumerate(PHASES)}
RECENT = 32  # steps whose seconds are kept
TICK_SECONDS = 0.5

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class Record(ctypes.Structure):
    """A file's content. Every field is stored at once; times are seconds of the node's monotonic clock."""

    _fields_ = (
        ("node", ctypes.c_char * 64),
        ("rank", ctypes.c_int64),
        ("world_size", ctypes.c_int64),
        ("pid", ctypes.c_int64),
        ("thread", ctypes.c_int64),  # the one that trains
        ("born", ctypes.c_double),  # unix seconds, to tell processes apart that had the same pid
        ("phase", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("within", ctypes.c_int64),  # marks since this phase of this step began
        ("marks", ctypes.c_int64),  # since the start
        ("changed", ctypes.c_double),
        ("ticked", ctypes.c_double),
        ("steps", ctypes.c_int64),  # that stand in the two rings below
        ("seconds", ctypes.c_double * RECENT),
        ("own", ctypes.c_double * RECENT),
        ("longest", ctypes.c_double * len(PHASES)),
        ("finished", ctypes.c_int64 * len(PHASES)),
    )


@dataclass(frozen=True)
class Beat:
    """What is known of one rank at one moment.

    Args:
        phase, step, within: where it is: the ``within``-th mark of ``phase`` in ``step``, which is -1 before the first.
        quiet: seconds since its last mark; silent: since its last tick.
        status: psutil's word for the process, such as "running" or "stopped", or "unreachable".
        seconds: what its recent steps took, evaluation and saves left out; own: the part that waited for no other rank.
        longest: of each phase that was left at least once, the longest time between two marks, in seconds.
    """

    host: str
    node: str
    rank: int
    world_size: int
    pid: int
    thread: int
    born: float
    phase: str
    step: int
    within: int
    marks: int
    quiet: float
    silent: float
    status: str
    seconds: tuple[float, ...]
    own: tuple[float, ...]
    longest: dict[str, float]


class Heart:
    """Marks where this process is. Made by the thread that trains, as its first act.

    Args:
        folder: on a disk of this node, by itself a name in its folder for temporary files; made if it is missing.
        node: Ray's id of the node, where several of them may share a disk.
    """

    def __init__(self, folder: str | Path, rank: int, world_size: int, node: str = "") -> None:
        place = here(folder)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"rank-{rank}"
        begun = path.with_name(f".{path.name}-{os.getpid()}")  # so that no reader sees half a file
        begun.write_bytes(bytes(ctypes.sizeof(Record)))
        with begun.open("r+b") as file:
            self._record = Record.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Record)))
        record, now = self._record, time.monotonic()
        record.node, record.rank, record.world_size = node.encode(), rank, world_size
        record.pid, record.thread, record.born = os.getpid(), threading.get_native_id(), psutil.Process().create_time()
        record.step, record.changed, record.ticked = -1, now, now
        begun.replace(path)
        self._longest, self._finished = record.longest, record.finished  # views, which cost more to make than to use
        self._step_seconds = self._own_seconds = 0.0
        self._stepped = False
        self._events: list[tuple[Any, Any]] = []
        _allow_stacks()
        threading.Thread(target=_tick, args=(record,), name="heartbeat", daemon=True).start()

    def at(self, phase: str, step: int | None = None) -> None:
        """Mark that ``phase`` begins or, if it is this one already, goes on."""
        record, now, number = self._record, time.monotonic(), _NUMBERS[phase]
        spent, left = now - record.changed, record.phase
        record.changed = now
        if spent > self._longest[left]:
            self._longest[left] = spent
        self._finished[left] += 1
        if PHASES[left] in STEPPING:
            self._step_seconds += spent
            if PHASES[left] == "data":
                self._own_seconds += spent
        step = record.step if step is None else step
        if step != record.step:
            self._close_step()
        record.within = record.within + 1 if (number, step) == (left, record.step) else 0
        record.phase, record.step = number, step
        record.marks += 1

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Mark ``name``, and at the end the phase that it interrupts."""
        before = PHASES[self._record.phase]
        self.at(name, step)
        try:
            yield
        finally:
            self.at(before)

    @contextmanager
    def own(self, *, cuda: bool = False) -> Iterator[None]:
        """Around work that waits for no other rank, such as the forward pass at ZeRO stages 0 to 2.

        Args:
            cuda: time it on the current CUDA stream rather than on this thread.
        """
        if cuda:
            import torch

            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.monotonic()
            yield
            self._own_seconds += time.monotonic() - start

    def _close_step(self) -> None:
        """Keep the seconds of a step that ended, except those of the first, which compiles and allocates."""
        for begin, end in self._events:
            end.synchronize()  # a forward pass whose backward pass the host has seen end, or nearly so
            self._own_seconds += begin.elapsed_time(end) / 1000
        if self._stepped:
            record = self._record
            place = record.steps % RECENT
            record.seconds[place], record.own[place] = self._step_seconds, self._own_seconds
            record.steps += 1
        self._stepped = self._record.step >= 0
        self._step_seconds = self._own_seconds = 0.0
        self._events.clear()


def here(folder: str | Path) -> Path:
    """A folder of beats on this node."""
    return Path(tempfile.gettempdir(), folder)


def read_beats(folder: str | Path, node: str = "") -> list[Beat]:
    """The living ranks of one node, in order."""
    beats = [_beat(path.read_bytes()) for path in here(folder).glob("rank-*")]
    return sorted((beat for beat in beats if beat and beat.node == node), key=lambda beat: beat.rank)


def process(beat: Beat) -> psutil.Process | None:
    """The rank's process; None if it has ended, also if another has its pid by now."""
    try:
        found = psutil.Process(beat.pid)
        alive = found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - beat.born) < 60
    except psutil.NoSuchProcess:
        return None
    return found if alive else None


def _beat(content: bytes) -> Beat | None:
    record, now = Record.from_buffer_copy(content), time.monotonic()
    kept = min(record.steps, RECENT)
    beat = Beat(
        host=socket.gethostname(),
        node=record.node.decode(),
        rank=record.rank,
        world_size=record.world_size,
        pid=record.pid,
        thread=record.thread,
        born=record.born,
        phase=PHASES[record.phase],
        step=record.step,
        within=record.within,
        marks=record.marks,
        quiet=now - record.changed,
        silent=now - record.ticked,
        status="",
        seconds=tuple(record.seconds[:kept]),
        own=tuple(record.own[:kept]),
        longest={name: record.longest[i] for i, name in enumerate(PHASES) if record.finished[i]},
    )
    found = process(beat)
    try:
        return Beat(**{**vars(beat), "status": found.status()}) if found else None
    except psutil.NoSuchProcess:
        return None


def _tick(record: Record) -> None:
    while True:
        time.sleep(TICK_SECONDS)
        record.ticked = time.monotonic()


def _allow_stacks() -> None:
    """Let any process of this user read this one's stack, which Yama (ptrace_scope 1) would keep to its ancestors."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux; where Yama is off the call fails, and is not needed
        libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
