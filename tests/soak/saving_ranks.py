"""Ranks that save after every step to slow storage, until they are killed: raymodels' own loop and a DeepSpeed script.

What each is doing stands on a `Board`, which outlives it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.throttle import throttle
from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.config import Config

WORKERS = 2
SYNC_SECONDS = 0.02
PHASES = ("between", "write", "acknowledge", "declare", "retire")


class Board:
    """How many saves a rank has begun and what it does for the newest, in memory that outlives its process."""

    def __init__(self, folder: str, rank: int) -> None:
        path = Path(folder) / f"board-{rank}"
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("q")

    def mark(self, phase: str) -> None:
        self._words[1] = PHASES.index(phase)

    @property
    def saves(self) -> int:
        return self._words[0]

    @property
    def phase(self) -> str:
        return PHASES[self._words[1]]

    def marking(self, owner: Any, name: str, phase: str, after: str | None = None) -> None:
        """From now on a call of ``owner.name`` marks the phase, and its return the one after, if it is a whole save."""
        original: Callable[..., Any] = getattr(owner, name)

        def marked(*given: Any, **options: Any) -> Any:
            self._words[0] += after == "between"
            self.mark(phase)
            try:
                return original(*given, **options)
            finally:
                if after:
                    self.mark(after)

        setattr(owner, name, marked)


def slow_down(bytes_per_second: float) -> None:
    """Make this process's storage slow, to write and to sync."""
    throttle(bytes_per_second)
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        time.sleep(SYNC_SECONDS)
        sync(descriptor)

    os.fsync = slow_sync  # type: ignore[assignment]


def train_ours(config: Config, prepared: str, rank: int, folder: str) -> None:
    from raymodels.checkpoint.save import Saver
    from raymodels.train import loop
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.signals import Signals

    board, phases = Board(folder, rank), Phases()
    for name, phase in {"_write": "write", "_exchange": "acknowledge", "_declare": "declare"}.items():
        board.marking(Saver, name, phase)
    board.marking(layout, "retain", "retire")
    board.marking(Saver, "_run_save", "write", after="between")
    session = loop.open_session(config, prepared, phases, lambda text: None)
    tell(folder, rank, session.state.step, session.engine)
    with Signals(config.place, 1) as signals:
        loop.train(session, phases, lambda news: None, signals, Interval(1, WORKERS, 0, 0.0, time.monotonic()))


def train_deepspeed(config: Config, prepared: str, rank: int, folder: str) -> None:
    import deepspeed
    import torch

    from raymodels.train import loop
    from raymodels.train.meter import Phases

    board, phases = Board(folder, rank), Phases()
    session = loop.open_session(config, prepared, phases, lambda text: None)
    place = f"{config.place}/deepspeed"
    step = load_deepspeed(session.engine, place)
    tell(folder, rank, step, session.engine)
    board.marking(torch, "save", "write", after="acknowledge")
    board.marking(deepspeed.DeepSpeedEngine, "save_checkpoint", "write", after="between")
    for done in range(step + 1, config.train.steps + 1):
        loop.optimizer_step(session, done - 1, phases, loop.Votes())
        session.engine.save_checkpoint(place, tag=f"step-{done}", client_state={"done": done})
        if rank == 0:
            shutil.rmtree(f"{place}/step-{done - 2}", ignore_errors=True)


def load_deepspeed(engine: Any, place: str) -> int:
    """Steps done in what ``latest`` names; 0 without one."""
    if not Path(place, "latest").exists():
        return 0
    path, client = engine.load_checkpoint(place)
    assert path is not None, "load_checkpoint found nothing"
    return int(client["done"])


CONTENDERS = {"raymodels": train_ours, "DeepSpeed": train_deepspeed}


def tell(folder: str, rank: int, step: int, engine: Any) -> None:
    """Leave word of what this rank has restored."""
    from raymodels.checkpoint.restore import whole_digest

    found = {"step": step, "digest": whole_digest(engine)}
    storage.write_json(f"{folder}/restored-{rank}", found)


def rank_main(rank: int, contender: str, config: Config, prepared: str, folder: str, speed: float) -> None:
    import torch
    import torch.distributed as dist

    os.dup2(os.open(f"{folder}/log-{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS), "LOCAL_SIZE": str(WORKERS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    slow_down(speed)
    CONTENDERS[contender](config, prepared, rank, folder)


def undisturbed(config: Config, prepared: str, steps: int) -> list[str]:
    """The digest of the whole state after 0, 1, ... steps of a run that nobody kills."""
    from raymodels.checkpoint.restore import whole_digest
    from raymodels.train import loop
    from raymodels.train.meter import Phases

    phases = Phases()
    session = loop.open_session(config, prepared, phases, lambda text: None)
    digests = [whole_digest(session.engine)]
    for step in range(steps):
        loop.optimizer_step(session, step, phases, loop.Votes())
        digests.append(whole_digest(session.engine))
    return digests
