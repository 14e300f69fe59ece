"""The planner's peak beside the card's: ZeRO stages 0 to 3, with and without activation checkpointing and offload.

On the CPU malloc's own figures stand for the card's, as in `benchmarks.planner_accuracy`.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.machine import Machine, Size, forget, join_process_group
from benchmarks.gpu.sheet import Sheet

if TYPE_CHECKING:
    from raymodels.config import Config

STEPS = 3
ERROR = {True: 0.08, False: 0.15}
ON_CARD, ON_CPU = Size("0.5 B", 1536, 16, 12), Size("3 M", 192, 6, 4)
OPTIMIZER, PARAMETERS = {"offload_optimizer": {"device": "cpu"}}, {"offload_params": {"device": "cpu"}}
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((f"stage {stage}", {"stage": stage}) for stage in range(4)),
    *((f"stage {stage}, optimizer offloaded", {"stage": stage, **OPTIMIZER}) for stage in (1, 2, 3)),
    ("stage 3, optimizer and parameters offloaded", {"stage": 3, **OPTIMIZER, **PARAMETERS}),
]


def measure(machine: Machine, sheet: Sheet) -> None:
    if not machine.cuda and not _counting_malloc(machine):
        sheet.not_run("peak", "malloc is counted by a library that takes a C compiler, cc")
        return
    join_process_group(machine)
    for name, zero in WAYS:
        for checkpointing in (False, True):
            what = f"{name}{', checkpointed' if checkpointing else ''}"
            if "offload_optimizer" in zero and not machine.cuda:
                if not checkpointing:
                    sheet.not_run(name, "on a CPU there is no other memory to offload to")
                continue
            with sheet.guarded(what):
                _compare(machine, sheet, what, zero, checkpointing)
            forget(machine)


def _counting_malloc(machine: Machine) -> bool:  # noqa: RET503 (execve does not return)
    """Start this process again with malloc counted, before anything heavy is imported; false where that cannot be."""
    if os.environ.get("LD_PRELOAD", "").endswith("malloc_meter.so"):
        return True
    if not shutil.which("cc"):
        return False
    from benchmarks.peak_memory import preload_meter

    preload_meter(str(machine.folder))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(os.environ))


def _compare(machine: Machine, sheet: Sheet, what: str, zero: dict[str, Any], checkpointing: bool) -> None:
    from benchmarks.peak_memory import measured
    from raymodels.train.planner import plan

    config = settings(machine, zero, checkpointing)
    chosen = plan(config).chosen
    if machine.cuda and chosen.needed > (free := machine.free_bytes()):
        sheet.not_run(what, f"it needs {chosen.needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        return
    peak = measured(config, machine.vocabulary, STEPS)["peak"]
    error = chosen.memory.peak / peak - 1
    note = f"{chosen.memory.peak / 1e6:,.0f} MB planned, {peak / 1e6:,.0f} MB held"
    sheet.bar(f"{what}: off by", round(abs(error), 4), "<=", ERROR[machine.cuda], note)


def settings(machine: Machine, zero: dict[str, Any], checkpointing: bool) -> Config:
    train = {
        "steps": 1000,
        "global_batch": 4,
        "micro_batch": 2,
        "precision": "bf16" if machine.cuda else "fp32",
        "activation_checkpointing": checkpointing,
    }
    size = ON_CARD if machine.cuda else ON_CPU
    bucket = {} if machine.cuda else {"reduce_bucket_size": 1_000_000}
    return machine.config("planner", size, 1024 if machine.cuda else 128, train, zero={**zero, **bucket})
