"""A training step: tokens a second, MFU and memory of ours beside a bare DeepSpeed loop and a bare torch loop.

The three take turns, step by step. Ours and the bare DeepSpeed loop share one engine, so that both fit at any size.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.machine import (
    LARGE,
    MIDDLE,
    SMALL,
    Machine,
    Size,
    card_peak_tflops,
    forget,
    join_process_group,
    prepared,
)
from benchmarks.gpu.sheet import Sheet

if TYPE_CHECKING:
    from raymodels.config import Config

WARM_UP, TURNS = 2, 5
BARE_BOUND, MFU_GOAL = 0.97, 0.40
MICRO_BATCH = {SMALL: 8, MIDDLE: 4, LARGE: 1}
MASTER_AND_MOMENTS, HALF = 12, 2


def measure(machine: Machine, sheet: Sheet) -> None:
    join_process_group(machine)
    for size in (SMALL, MIDDLE, LARGE) if machine.cuda else (SMALL,):
        for checkpointing in (False, True):
            name = f"{machine.size(size).name}{', checkpointed' if checkpointing else ''}"
            with sheet.guarded(name):
                _compare(machine, sheet, name, size, checkpointing)
            forget(machine)
    if not machine.cuda:
        sheet.not_run("1.2 B and 7 B", "sizes for a card")


def _compare(machine: Machine, sheet: Sheet, name: str, size: Size, checkpointing: bool) -> None:
    from raymodels.train.planner import plan

    config = settings(machine, size, checkpointing)
    needed, free = plan(config).chosen.needed, machine.free_bytes()
    if machine.cuda and needed > free:
        sheet.not_run(name, f"it needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        return
    loops, flops, parameters = make_loops(machine, config)
    tokens = config.train.global_batch * config.data.seq_len
    peak = alone(machine, loops["raymodels"])
    beside = (2 * HALF + MASTER_AND_MOMENTS) * parameters
    if not machine.cuda or needed + beside < free:
        loops["bare torch"] = make_torch_loop(machine, config)
    else:
        sheet.not_run(f"{name}: bare torch", "both models do not fit at once")
    seconds = take_turns(machine, loops)
    medians = {loop: statistics.median(taken) for loop, taken in seconds.items()}
    for loop, median in medians.items():
        sheet.figure(f"{name}: tokens/s, {loop}", round(tokens / median, 1))
    pairs = [bare / ours for ours, bare in zip(seconds["raymodels"], seconds["bare DeepSpeed"], strict=True)]
    if machine.cuda:
        sheet.bar(f"{name}: of bare DeepSpeed", statistics.median(pairs), ">=", BARE_BOUND)
        sheet.figure(f"{name}: peak memory, GB", round(peak / 1e9, 2))
        _mfu(sheet, name, flops / medians["raymodels"], size)
    else:
        sheet.figure(f"{name}: of bare DeepSpeed", statistics.median(pairs), "at tiny sizes it tells little")


def _mfu(sheet: Sheet, name: str, flops_per_second: float, size: Size) -> None:
    import torch

    card = torch.cuda.get_device_name(0)
    peak = card_peak_tflops(card)
    if peak is None:
        sheet.not_run(f"{name}: MFU", f"the peak of {card} is not in benchmarks/gpu/machine.py")
    else:
        goal = f"goal {MFU_GOAL}" if size == MIDDLE else ""
        sheet.figure(f"{name}: MFU of {peak:g} TFLOP/s", round(flops_per_second / peak / 1e12, 4), goal)


def settings(machine: Machine, size: Size, checkpointing: bool) -> Config:
    micro_batch = MICRO_BATCH[size] if machine.cuda else 2
    train = {
        "steps": 1000,
        "global_batch": micro_batch,
        "micro_batch": micro_batch,
        "precision": "bf16" if machine.cuda else "fp32",
        "activation_checkpointing": checkpointing,
    }
    return machine.config("step", machine.size(size), 4096 if machine.cuda else 64, train, zero={"stage": 2})


def make_loops(machine: Machine, config: Config) -> tuple[dict[str, Callable[[int], Any]], float, int]:
    """Ours and the bare DeepSpeed loop by name, the FLOPs of a step, and the model's parameters."""
    from benchmarks.gpu.plain import PlainDeepSpeed, Samples
    from raymodels.models.build import parameter_count
    from raymodels.train import loop
    from raymodels.train.meter import Phases

    place, phases = prepared(config), Phases()
    session = loop.open_session(config, place, phases, warnings.warn)
    bare = PlainDeepSpeed(Samples(config, place, machine.device), session.engine)

    def ours(step: int) -> None:
        loop.optimizer_step(session, step, phases, loop.Votes())

    shape = session.engine.module.config
    flops = flops_of_step(shape, config.train.micro_batch, config.data.seq_len)
    return {"raymodels": ours, "bare DeepSpeed": bare.step}, flops, parameter_count(shape)


def make_torch_loop(machine: Machine, config: Config) -> Callable[[int], Any]:
    from benchmarks.gpu.plain import PlainTorch, Samples

    return PlainTorch(Samples(config, prepared(config), machine.device), machine.device).step


def flops_of_step(shape: Any, batch: int, tokens: int) -> float:
    """By torch's own counter, of a forward and backward pass on tensors without data; recomputation not counted."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from raymodels.train.planner.trace import UNMASKED

    shape = copy.deepcopy(shape)
    shape._attn_implementation = UNMASKED  # transformers' own looks at the mask's data
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
    return float(counter.get_total_flops())


def alone(machine: Machine, step: Callable[[int], Any]) -> int:
    """The most memory that a loop takes, in bytes; 0 on the CPU."""
    import torch

    for number in range(WARM_UP):
        step(number)
    return int(torch.cuda.max_memory_allocated()) if machine.cuda else 0


def take_turns(machine: Machine, loops: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Seconds of each loop's steps, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-WARM_UP, TURNS):
        for name, step in loops.items():
            machine.synchronize()
            start = time.perf_counter()
            step(turn + 2 * WARM_UP)
            machine.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds
