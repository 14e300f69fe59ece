"""What one rank of a config holds at most while it trains, for the planner to be set beside."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path
from typing import Protocol

from raymodels.config import Config

STATES = ("parameters", "gradients", "optimizer")


class Meter(Protocol):
    """Counts the bytes of a device's memory that are held."""

    def held(self) -> int:
        """Now."""

    def reset(self) -> None:
        """Count the most held from here on."""

    def peak(self) -> int:
        """The most held since `reset`."""


class MallocMeter:
    """Of a process that was started after `preload_meter`: malloc's own figures."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.meter_held.restype = self._library.meter_peak.restype = ctypes.c_long

    def held(self) -> int:
        return int(self._library.meter_held())

    def reset(self) -> None:
        self._library.meter_reset()

    def peak(self) -> int:
        return int(self._library.meter_peak())


class CudaMeter:
    """Of this process's tensors on the card."""

    def held(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()


def measured(config: Config, vocab_size: int, steps: int) -> dict[str, float]:
    """What this rank holds at most over so many steps: bytes of model states by kind where they lie on the device, the
    ``peak`` of the device's memory from before the model is built, and what is ``resident``. Needs a process group.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.zero_memory import state_bytes
    from raymodels.models.build import DTYPES, architecture
    from raymodels.tasks import task
    from raymodels.train.engine import join_process_group, make_engine, make_model

    meter: Meter = CudaMeter() if config.workers.gpus else MallocMeter()
    device = torch.device("cuda" if config.workers.gpus else "cpu")
    join_process_group()
    shape = architecture(config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, eos_id=0)
    ids = torch.randint(0, vocab_size, (config.train.micro_batch, config.data.seq_len), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    # What libraries take once and keep, by the kind of CPU or card, is not the model's: the planner has it apart.
    throwaway = AutoModelForCausalLM.from_config(shape).to(device, DTYPES[config.train.precision])
    task(config.task.kind).loss(throwaway, batch).backward()
    del throwaway
    before = meter.held()
    meter.reset()
    engine = make_engine(config, make_model(config, config.model, shape))
    states = dict.fromkeys(STATES, 0)
    accumulation = config.accumulation(torch.distributed.get_world_size())
    offloaded = any(o.device != "none" for o in (config.zero.offload_optimizer, config.zero.offload_params))
    for micro_step in range(steps * accumulation):
        loss = task(config.task.kind).loss(engine, batch)
        engine.backward(loss / ids.numel(), scale_wrt_gas=False)
        if micro_step >= accumulation and not offloaded:  # the moments exist from the first step on
            states = {kind: max(states[kind], held) for kind, held in state_bytes(engine).items()}
        engine.step()
        del loss
    peak = meter.peak() - before
    return {**states, "peak": peak, "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def preload_meter(folder: str) -> None:
    """Have the processes that start from here on count their allocations."""
    library = Path(folder, "malloc_meter.so")
    source = Path(__file__).with_name("malloc_meter.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    os.environ["LD_PRELOAD"] = str(library)
