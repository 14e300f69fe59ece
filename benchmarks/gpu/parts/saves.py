"""Asynchronous saves through pinned memory: what they cost, a resume bit for bit in another process, kill -9 in a save.

All with deterministic algorithms, since attention's backward pass on a card may add up in any order otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.machine import MIDDLE, Machine, join_process_group, prepared
from benchmarks.gpu.sheet import Sheet

if TYPE_CHECKING:
    from raymodels.config import Config

BEFORE, AFTER = 4, 5
OVERHEAD = 0.035
BEGIN_S = 150.0


def measure(machine: Machine, sheet: Sheet) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs to be deterministic; read when it starts
    config = settings(machine)
    place = prepared(config)
    first = in_process(save_once, machine, config, place)
    sheet.figure("a save, GB", round(first["bytes"] / 1e9, 3))
    sheet.figure("a save, seconds from its begin to its commit", round(first["seconds"], 2))
    sheet.figure("a save blocks training for, seconds", round(first["blocked"], 3))
    sheet.figure("steps taken meanwhile", first["meanwhile"])
    if machine.cuda:
        sheet.bar("share of time blocked, saving without a break", first["share"], "<=", OVERHEAD)
    else:
        sheet.figure("share of time blocked, saving without a break", first["share"], "at tiny sizes it tells little")
    resumed = in_process(resume_then_die, machine, config, place, killed=True)
    differ = sum(a != b for a, b in zip(first["losses"], resumed["losses"], strict=True))
    sheet.bar(f"of {AFTER} losses after a resume in another process: other bits", differ, "==", 0)
    again = in_process(resume, machine, config, place)
    sheet.figure("killed while saving step, resumed from step", f"{resumed['saving']}, {again['step']}")
    right = again["step"] in (BEFORE, resumed["saving"]) and again["loss"] == resumed["by_step"][str(again["step"])]
    sheet.bar("loss after kill -9 in a save and a resume: other bits", int(not right), "==", 0)


def settings(machine: Machine) -> Config:
    train = {"steps": 10_000, "global_batch": 2, "micro_batch": 2, "precision": "bf16" if machine.cuda else "fp32"}
    sections = {"zero": {"stage": 2}, "checkpoint": {"every": 10**6, "keep": 2}}
    return machine.config("saves", machine.size(MIDDLE), 1024 if machine.cuda else 64, train, **sections)


def in_process(target: Any, machine: Machine, config: Config, place: str, killed: bool = False) -> dict[str, Any]:
    """What a process of its own has written, by its end or, where it is to be killed, once a save has begun."""
    told = machine.folder / f"{target.__name__}.json"
    told.unlink(missing_ok=True)
    process = get_context("spawn").Process(target=target, args=(machine, config, place, told))
    process.start()
    if killed:
        deadline = time.monotonic() + BEGIN_S
        while not told.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.pid and told.exists(), f"{target.__name__} ended before its save"
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    expected = -signal.SIGKILL if killed else 0
    assert process.exitcode == expected, f"{target.__name__} ended with {process.exitcode}, not {expected}"
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def tell(told: Path, found: dict[str, Any]) -> None:
    """Leave word, whole or not at all."""
    begun = told.with_suffix(".part")
    begun.write_text(json.dumps(found))
    begun.replace(told)


class Run:
    """A session of the run, stepped and saved by hand."""

    def __init__(self, machine: Machine, config: Config, place: str) -> None:
        import torch

        from raymodels.train import loop
        from raymodels.train.meter import Phases

        torch.use_deterministic_algorithms(True, warn_only=True)
        # DeepSpeed's buckets have gigabytes, of which little is used: filling them would take seconds.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        join_process_group(machine)
        self._loop, self._phases, self._machine = loop, Phases(), machine
        self.session = loop.open_session(config, place, self._phases, warnings.warn)
        self.step = self.session.state.step

    def train(self) -> float:
        """One step; its loss, in nats."""
        taken = self._loop.optimizer_step(self.session, self.step, self._phases, self._loop.Votes())
        self.step += 1
        return taken.loss

    def begin_save(self) -> float:
        """Begin to save; the seconds for which that blocked."""
        config, fingerprint = self.session.config, self.session.fingerprint
        self._machine.synchronize()
        start = time.perf_counter()
        self.session.saver.save(self._loop._state(config, fingerprint, self.step, 0, {}, {}))
        return time.perf_counter() - start


def save_once(machine: Machine, config: Config, place: str, told: Path) -> None:
    """Train, save twice in the background (the first one takes pinned memory for the run), and train on."""
    run = Run(machine, config, place)
    saver = run.session.saver
    for done in range(1, BEFORE + 1):
        run.train()
        if done == BEFORE - 1:
            run.begin_save()
            saver.wait()
            saver.outcomes()
    blocked = run.begin_save()
    losses, outcomes = list[float](), list[Any]()
    while not outcomes or len(losses) < AFTER:
        losses.append(run.train())
        outcomes = outcomes or saver.outcomes()
    meanwhile = len(losses)
    [outcome] = outcomes
    assert outcome.error is None, outcome.error
    tell(
        told,
        {
            "losses": [loss.hex() for loss in losses[:AFTER]],
            "bytes": outcome.bytes,
            "seconds": outcome.seconds,
            "blocked": blocked,
            "share": blocked / outcome.seconds,
            "meanwhile": meanwhile,
        },
    )


def resume_then_die(machine: Machine, config: Config, place: str, told: Path) -> None:
    """Resume, train, and begin a save in which this process is to be killed."""
    run = Run(machine, config, place)
    assert run.step == BEFORE, run.step
    by_step = {str(run.step): run.train().hex() for _ in range(AFTER)}
    saver, saving = run.session.saver, run.step
    write = saver._write

    def write_and_tell(*args: Any) -> Any:
        tell(told, {"losses": list(by_step.values()), "by_step": by_step, "saving": saving})
        time.sleep(1.0 if machine.cuda else 0.2)  # so that the kill falls before or within the writing
        return write(*args)

    saver._write = write_and_tell  # type: ignore[method-assign, assignment]
    run.begin_save()
    by_step[str(saving)] = run.train().hex()
    time.sleep(BEGIN_S)


def resume(machine: Machine, config: Config, place: str, told: Path) -> None:
    """Resume from what is left, and take one step."""
    run = Run(machine, config, place)
    step = run.step
    tell(told, {"step": step, "loss": run.train().hex()})
