"""How fast, and how rightly, a rank that holds the others up is named: real DeepSpeed ranks over gloo, real faults.

Each fault hits a random rank at a random step: the process is stopped (SIGSTOP, at any moment), misses a collective,
leaves the loop, loops or reads for ever. The named stack is compared, function by function, with what the process
itself dumps of it (faulthandler). A long healthy run, whose first step, an evaluation and a save each outlast the
bound, must raise no alarm, and a slow rank must be told as slow.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.report import Bar, report
from raymodels.train.heartbeat import Heart, read_beats
from raymodels.train.verdict import SKIPPED, STOPPED, STUCK, Bounds, Slow, Verdict, median_step
from raymodels.train.watch import POLL_SECONDS, Monitor, Sentry
from tests.soak.size import small

KINDS = {
    "stop": STOPPED,
    "skip weight": SKIPPED,
    "skip gradients": SKIPPED,
    "skip evaluation": SKIPPED,
    "leave": SKIPPED,
    "spin": STUCK,
    "read": STUCK,
}
EVALUATE_EVERY, SAVE_EVERY = 10, 25
FOREVER = 10**9


@dataclass(frozen=True)
class Plan:
    """What a group of ranks does: where the fault is, and what takes how many seconds."""

    world_size: int
    steps: int = FOREVER
    fault: str = ""
    rank: int = -1
    at: int = -1
    step_seconds: float = 0.0
    slow_seconds: float = 0.0  # more, on ``rank``
    long_seconds: float = 0.0  # of the first step, one evaluation and one save


@dataclass(frozen=True)
class Named:
    """A verdict, when it came, and whether the process agreed on its stack."""

    verdict: Verdict
    moment: float
    right_stack: bool


class Ranks:
    """The processes of a plan, and the folder in which they leave their beats, tracebacks and the fault's moment."""

    def __init__(self, folder: str, processes: list[BaseProcess]) -> None:
        self.folder, self.beats = Path(folder), f"{folder}/beats"
        self.processes = processes

    def check(self) -> None:
        """Raise with what it printed if a rank has died."""
        died = [rank for rank, process in enumerate(self.processes) if not process.is_alive()]
        assert not died, [(self.folder / f"log-{rank}").read_text() for rank in died]

    def moment(self) -> float:
        return float((self.folder / "moment").read_text())


@contextmanager
def ranks(plan: Plan) -> Iterator[Ranks]:
    """Start a plan's ranks; kill what is left of them at the end."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the server imports DeepSpeed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raymodels.train.engine"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_main, args=(plan, rank, folder), daemon=True) for rank in range(plan.world_size)
        ]
        for process in processes:
            process.start()
        try:
            yield Ranks(folder, list(processes))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def rank_main(plan: Plan, rank: int, folder: str) -> None:
    os.dup2(os.open(f"{folder}/log-{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    heart = Heart(f"{folder}/beats", rank, plan.world_size)
    with Path(f"{folder}/trace-{rank}").open("w") as trace:
        faulthandler.register(signal.SIGUSR1, trace, all_threads=True)
        Program(plan, rank, folder, heart).train()
        heart.at("ending")
        signal.pause()


class Program:
    """One rank: a small model in a DeepSpeed engine at ZeRO stage 2, and the phases of a training loop around it."""

    def __init__(self, plan: Plan, rank: int, folder: str, heart: Heart) -> None:
        import deepspeed
        import torch
        import torch.distributed as dist

        from raymodels.train.engine import join_process_group

        self.plan, self.rank, self.folder, self.heart = plan, rank, folder, heart
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(plan.world_size)}
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=plan.world_size)
        join_process_group()
        layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(4)]
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        self.engine, *_ = deepspeed.initialize(model=torch.nn.Sequential(*layers), config=config)

    def train(self) -> None:
        for step in range(self.plan.steps):
            if self._hits("leave", step):
                return
            self.heart.at("data", step)
            batch = self.read_batch(step)
            self.heart.at("weigh")
            if not self._hits("skip weight", step):
                self.all_reduce()
            self.heart.at("step")
            self.optimize(batch, step)
            if (step + 1) % EVALUATE_EVERY == 0:
                with self.heart.phase("evaluation"):
                    self.evaluate(batch, step)
            if (step + 1) % SAVE_EVERY == 0:
                with self.heart.phase("save"):
                    self.save(step)

    def read_batch(self, step: int) -> Any:
        import torch

        if self._hits("read", step):
            self.read_for_ever()
        return torch.randn(8, 64)

    def optimize(self, batch: Any, step: int) -> None:
        if self._hits("skip gradients", step):
            return
        if step == 0:
            time.sleep(self.plan.long_seconds)
        with self.heart.own():
            loss = self.engine(batch).square().mean()
            time.sleep(self.plan.step_seconds + self.plan.slow_seconds * (self.rank == self.plan.rank))
        if self._hits("spin", step):
            self.spin()
        self.engine.backward(loss)
        self.engine.step()

    def evaluate(self, batch: Any, step: int) -> None:
        import torch

        with torch.no_grad():
            for _ in range(4):
                self.engine(batch)
        if step + 1 == 5 * EVALUATE_EVERY:
            time.sleep(self.plan.long_seconds)
        if not self._hits("skip evaluation", step):
            self.all_reduce()

    def save(self, step: int) -> None:
        import torch
        import torch.distributed as dist

        if self.rank == 0:
            torch.save(self.engine.module.state_dict(), f"{self.folder}/saved")
            if step + 1 == 4 * SAVE_EVERY:
                time.sleep(self.plan.long_seconds)
        dist.barrier()

    def all_reduce(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones((), dtype=torch.float64))

    def read_for_ever(self) -> None:
        while True:
            time.sleep(1000)

    def spin(self) -> None:
        while True:
            pass

    def _hits(self, fault: str, step: int) -> bool:
        hits = (fault, self.rank, step) == (self.plan.fault, self.plan.rank, self.plan.at)
        if hits:
            Path(f"{self.folder}/moment").write_text(str(time.monotonic()))
        return hits


def stop_when_there(group: Ranks, plan: Plan, draw: random.Random) -> None:
    """SIGSTOP the plan's rank at a random moment of its step ``at`` or soon after."""
    while True:
        group.check()
        for beat in read_beats(group.beats):
            if (beat.rank, beat.step) >= (plan.rank, plan.at) and beat.rank == plan.rank:
                time.sleep(draw.random() * 2 * (median_step([beat]) or 0.0))
                os.kill(beat.pid, signal.SIGSTOP)
                (group.folder / "moment").write_text(str(time.monotonic()))
                return
        time.sleep(0.001)


def monitored(group: Ranks, bounds: Bounds, ended: Callable[[list[Named]], bool]) -> tuple[list[Named], list[Slow]]:
    """Watch a group as the driver does until ``ended`` says so; what was named, and what was told as slow."""
    named: list[Named] = []
    slow: list[Slow] = []

    def on_verdict(verdict: Verdict) -> None:
        moment = time.monotonic()
        named.append(Named(verdict, moment, stack_agrees(group, verdict)))

    monitor = Monitor(Sentry(group.beats), on_verdict, slow.append, bounds)
    while not ended(named):
        group.check()
        time.sleep(POLL_SECONDS)
        monitor.look()
    return named, slow


def stack_agrees(group: Ranks, verdict: Verdict) -> bool:
    """Whether the process itself, by faulthandler, tells the same functions. A stopped one does as it goes on."""
    trace = group.folder / f"trace-{verdict.rank}"
    before = trace.stat().st_size
    # To the main thread, which then dumps before it goes on; another thread would see it some frames further.
    ctypes.CDLL(None).tgkill(verdict.pid, verdict.pid, signal.SIGUSR1)
    os.kill(verdict.pid, signal.SIGCONT)
    deadline = time.monotonic() + 5
    while trace.stat().st_size == before and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    dumped = trace.read_text()[before:].split("most recent call first):")[-1]  # the main thread comes last
    theirs = re.findall(r" in (\S+)", dumped)
    ours = [line.split(" ")[0].rpartition(".")[2] for line in verdict.stack.splitlines()]
    return bool(theirs) and theirs == ours


def inject(plan: Plan, draw: random.Random, bounds: Bounds | None = None) -> tuple[Named | None, float, float]:
    """Run a plan to its verdict: it, the seconds that it took from the fault on, and what they may be."""
    bounds = bounds or Bounds()
    with ranks(plan) as group:
        if plan.fault == "stop":
            stop_when_there(group, plan, draw)
        deadline = time.monotonic() + 120
        named, _ = monitored(group, bounds, lambda named: bool(named) or time.monotonic() > deadline)
        bound = max(bounds.seconds, bounds.steps * (median_step(read_beats(group.beats)) or 0.0))
        return (named[0], named[0].moment - group.moment(), bound) if named else (None, float("inf"), bound)


def healthy(plan: Plan, bounds: Bounds | None = None) -> tuple[list[Named], list[Slow]]:
    """Run a plan without a fault to its last step: what was named and told as slow."""
    with ranks(plan) as group:

        def ended(named: list[Named]) -> bool:
            beats = read_beats(group.beats)
            return bool(named) or [beat.phase for beat in beats] == ["ending"] * plan.world_size

        return monitored(group, bounds or Bounds(), ended)


def microseconds_per_mark(steps: int = 50_000) -> float:
    """Of processor time, so that other processes on the machine do not count."""
    phases = ("data", "weigh", "step", "settle")
    with tempfile.TemporaryDirectory() as folder:
        heart = Heart(folder, 0, 1)
        start = time.thread_time()
        for step in range(steps):
            for phase in phases:
                heart.at(phase, step)
        return (time.thread_time() - start) / (steps * len(phases)) * 1e6


def plans(count: int, draw: random.Random) -> list[Plan]:
    """Faults, most often a stop and a skipped collective, on 2 and 3 ranks; every fifth at steps of 1.5 s."""
    order = [
        "stop",
        "skip weight",
        "stop",
        "skip gradients",
        "stop",
        "read",
        "stop",
        "skip evaluation",
        "spin",
        "leave",
    ]
    made = []
    for number in range(count):
        fault, world_size = order[number % len(order)], 2 + number % 2
        at = EVALUATE_EVERY * draw.randint(2, 4) - 1 if fault == "skip evaluation" else draw.randint(12, 45)
        plan = Plan(world_size, fault=fault, rank=draw.randrange(world_size), at=at)
        if number % 10 in (3, 4):
            plan = replace(plan, at=draw.randint(4, 6), step_seconds=1.5)
        made.append(plan)
    return made


def main() -> int:
    few = small()
    draw, rows = random.Random(7), list[dict[str, Any]]()
    for plan in plans(3 if few else 20, draw):
        named, seconds, bound = inject(plan, draw)
        verdict = named.verdict if named else None
        rows.append(
            {
                "fault": plan.fault,
                "ranks": plan.world_size,
                "rank": plan.rank,
                "named": verdict.rank if verdict else -1,
                "as": verdict.kind if verdict else "",
                "phase": verdict.phase if verdict else "",
                "seconds": seconds,
                "bound": bound,
                "stack": ("right" if named.right_stack else "wrong") if named else "",
                "innermost": re.sub(r"\(.*/", "(", verdict.stack.splitlines()[0]) if verdict else "",
            }
        )
        print(rows[-1], flush=True)
    right = [
        row["named"] == row["rank"] and row["as"] == KINDS[row["fault"]] and row["stack"] == "right" for row in rows
    ]
    steps = 200 if few else 1000
    alarms, slow_when_healthy = healthy(Plan(2, steps=steps, long_seconds=12.0))
    _, slow = healthy(Plan(2, steps=60, rank=1, step_seconds=0.02, slow_seconds=0.04))
    print(f"{steps} healthy steps: {len(alarms)} alarms, {len(slow_when_healthy)} told as slow")
    print(*(each.sentence for each in slow), sep="\n")
    bars = [
        Bar("named_right", sum(right), "==", len(rows)),
        Bar("slowest_naming_over_bound", max(row["seconds"] / row["bound"] for row in rows), "<=", 1.0),
        Bar("false_alarms", len(alarms), "==", 0),
        Bar("slow_rank_named", [each.rank for each in slow] == [1], "==", 1),
        Bar("mark_microseconds", microseconds_per_mark(), "<=", 20.0),
    ]
    return report("hang_naming", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
