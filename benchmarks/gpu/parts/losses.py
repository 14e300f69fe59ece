"""Losses of 20 steps through `raymodels.train.loop` at every ZeRO stage and precision, beside plain torch loops."""

from __future__ import annotations

import math
from multiprocessing import get_context
from typing import TYPE_CHECKING

from benchmarks.gpu.machine import SMALL, Machine, forget, join_process_group, prepared
from benchmarks.gpu.sheet import Sheet

if TYPE_CHECKING:
    from raymodels.config import Config

STEPS, STAGES = 20, range(4)
FP32_BOUND = 1e-4
HALF_OF_PLAIN = 2.0
"""How far from fp32 ours may be in half precision, as a multiple of what the plain loop is in it."""


def measure(machine: Machine, sheet: Sheet) -> None:
    config = settings(machine, "plain", "fp32", 0)
    place = prepared(config)
    with get_context("spawn").Pool(1) as pool:  # the CPU computes its losses while the card computes the others
        waiting = pool.apply_async(plain_losses, (config, place, "cpu")) if machine.cuda else None
        if machine.cuda:
            join_process_group(machine)
            on_card, _ = plain_losses(config, place, "cuda")
        else:
            join_process_group(machine)
        fp32 = {stage: losses(machine, place, "fp32", stage) for stage in STAGES}
        expected, _ = waiting.get() if waiting else plain_losses(config, place, "cpu")
    if machine.cuda:
        sheet.figure("plain torch, fp32 on the card: off the CPU", worst(on_card, expected))
    for stage, found in fp32.items():
        sheet.bar(f"stage {stage}, fp32: off plain torch on the CPU", worst(found, expected), "<=", FP32_BOUND)
    for precision, hindrance in machine.half_precisions().items():
        if hindrance:
            sheet.not_run(f"stages 0 to 3, {precision}", hindrance)
            continue
        with sheet.guarded(f"stages 0 to 3, {precision}"):
            _half(machine, sheet, place, precision, expected)


def _half(machine: Machine, sheet: Sheet, place: str, precision: str, expected: list[float]) -> None:
    plain, left_out = plain_losses(settings(machine, "plain", precision, 0), place, machine.device.type)
    off = worst(plain, expected)
    sheet.figure(f"plain torch, {precision}: off fp32", off, f"{left_out} steps left out" if left_out else "")
    for stage in STAGES:
        found = losses(machine, place, precision, stage)
        sheet.bar(f"stage {stage}, {precision}: off fp32", worst(found, expected), "<=", HALF_OF_PLAIN * off)


def settings(machine: Machine, name: str, precision: str, stage: int) -> Config:
    train = {"steps": STEPS + 1, "global_batch": 4, "micro_batch": 2, "precision": precision}
    seq_len = 256 if machine.cuda else 64
    return machine.config(name, machine.size(SMALL), seq_len, train, zero={"stage": stage})


def losses(machine: Machine, place: str, precision: str, stage: int) -> list[float]:
    """Of the training loop; it ends a step early, so that nothing is saved."""
    from raymodels.testing import train_here

    config = settings(machine, f"losses-{precision}-{stage}", precision, stage)
    session, reports = train_here(config, place, until=STEPS)
    del session
    forget(machine)
    return [report["loss"] for report in reports]


def plain_losses(config: Config, place: str, device: str) -> tuple[list[float], int]:
    """Of a plain torch loop, and how many steps it left out."""
    import torch

    from benchmarks.gpu.plain import PlainTorch, Samples

    loop = PlainTorch(Samples(config, place, torch.device(device)), torch.device(device))
    return [loop.step(step) for step in range(STEPS)], loop.left_out


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; NaN if a loss is missing or not finite."""
    if len(found) != len(expected) or not all(map(math.isfinite, found)):
        return math.nan
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
