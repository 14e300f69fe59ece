"""The planner's figures beside measured ones: six models at ZeRO stages 0 to 3 on two gloo ranks, through the engine.

Model states are the storages of the tensors that DeepSpeed's engine holds (as in `benchmarks.zero_memory`). The peak is
malloc's own high-water mark from before the model is built to the end of the third optimizer step, counted by
``benchmarks/malloc_meter.c`` preloaded into each rank. That is exact: resident memory (RSS) is not, as the allocator
keeps what was freed; nor is torch's profiler, which misses what gloo's threads free. It counts a little more than
tensors: Python's objects and DeepSpeed's, some 5 to 10 MB here. A pass of another copy of the model comes before: what
the math libraries keep from their first use on, more on a CPU with AVX-512 than on others, is no part of the peak.

"Fits" is tested the hard way: what the plan says to have must be more than what was resident at most, and its peak with
the margin more than malloc's, so that for no device memory a plan fits that does not. Sizes are the largest rank's.

Also met is the oracle in DeepSpeed's documentation ("Memory Requirements", memory.rst), t5-3b on 8 GPUs, and the
estimators in the installed DeepSpeed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

from benchmarks.peak_memory import STATES, measured, preload_meter
from benchmarks.report import Bar, quick, report
from raymodels.config import Config, ZeroConfig, validate
from raymodels.testing import run_ranks
from raymodels.train.planner import plan
from raymodels.train.planner.memory import Memory, Setting, Weights, deepspeed_estimate, memory
from raymodels.train.planner.options import MARGIN
from raymodels.train.planner.trace import Moment, Pass

WORKERS, STEPS = 2, 3
# name -> model, vocabulary, tokens of a sample, and settings of train. Buckets are of the models' size or smaller.
MODELS: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "llama": ({"hidden_size": 256, "layers": 8, "heads": 4}, 4096, 128, {"micro_batch": 2}),
    "gpt2": ({"hidden_size": 320, "layers": 5, "heads": 5, "dropout": 0.1}, 8192, 128, {"micro_batch": 1}),
    "qwen2": (
        {"hidden_size": 384, "layers": 4, "heads": 6, "kv_heads": 2, "tie_embeddings": False},
        *(8192, 192, {"micro_batch": 2}),
    ),
    "qwen3": ({"hidden_size": 512, "layers": 6, "heads": 8, "kv_heads": 4}, 4096, 64, {"micro_batch": 4}),
    "llama, checkpointed": (
        {"hidden_size": 256, "layers": 10, "heads": 4},
        *(2048, 256, {"micro_batch": 4, "activation_checkpointing": True}),
    ),
    "qwen2, bf16": ({"hidden_size": 384, "layers": 4, "heads": 6}, 8192, 24, {"micro_batch": 1, "precision": "bf16"}),
}
# DeepSpeed's documentation: GB (2^30) per GPU by stage and what is offloaded; 2,851 M parameters, 32 M in a layer.
DOCUMENTED = {(2, 0): 15.93, (2, 1): 5.31, (3, 0): 6.10, (3, 1): 0.79, (3, 2): 0.12}
T5_3B, T5_3B_LAYER, GPUS = 2_851_000_000, 32_000_000, 8


def config(name: str, stage: int, storage: str) -> Config:
    model, vocab_size, tokens, train = MODELS[name]
    live = {"prefetch_bucket_size": 300_000, "max_reuse_distance": 2_000_000, "max_live_parameters": 1_000_000}
    bounded = live if stage == 3 and name == "qwen3" else {}
    return validate(
        {
            "run": {"name": "planner", "storage": storage},
            "data": {"source": "python-stdlib", "seq_len": tokens, "tokenizer": {"vocab_size": vocab_size}},
            "model": {"arch": name.split(",")[0], **model},
            "train": {"steps": STEPS, "global_batch": 2 * WORKERS * train["micro_batch"], "lr": 1e-3, **train},
            "zero": {"stage": stage, "reduce_bucket_size": 1_000_000, **bounded},
            "workers": {"count": WORKERS},
        }
    )


def compare(name: str, stage: int, storage: str) -> dict[str, Any]:
    settings = config(name, stage, storage)
    ranks = run_ranks(measured, WORKERS, settings, MODELS[name][1], STEPS)
    seen = {kind: max(rank[kind] for rank in ranks) for kind in ranks[0]}
    chosen = plan(settings).chosen
    held: Memory = chosen.memory
    states = sum(seen[kind] for kind in STATES)
    return {
        "model": name,
        "stage": stage,
        "states": round(held.states),
        "states (measured)": states,
        "states off %": round(100 * (held.states / states - 1), 2),
        "peak": round(held.peak),
        "peak (measured)": seen["peak"],
        "peak off %": round(100 * (held.peak / seen["peak"] - 1), 2),
        "needed": round(chosen.needed),
        "resident": seen["resident"],
        "with margin / malloc": round(held.peak * MARGIN / seen["peak"], 3),
    }


def documented_error() -> float:
    """The worst relative difference of the planner by DeepSpeed's accounting from DeepSpeed's documentation."""
    weights = Weights((T5_3B,), itemsize=2)
    return max(
        abs(deepspeed_estimate(weights, T5_3B_LAYER, t5_setting(*way)) / 2**30 / documented - 1)
        for way, documented in DOCUMENTED.items()
    )


def installed_error() -> float:
    """The same from the estimators in the installed DeepSpeed.

    Its ZeRO-2 counts gradients as partitioned, where the documentation's figure counts them whole; that is what the
    planner says itself, with the fp32 gradients that the update makes.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    weights, nothing = Weights((T5_3B,), itemsize=2), Pass(0, 0, (Moment("forward", 0, 0),))
    held = memory(weights, t5_setting(2, 0), nothing)
    pairs = [(held.states + 4 * T5_3B / GPUS, zero2(T5_3B, GPUS, cpu_offload=False)[1])]
    for offloaded in range(3):
        ours = deepspeed_estimate(weights, T5_3B_LAYER, t5_setting(3, offloaded))
        theirs = zero3(T5_3B, T5_3B_LAYER, GPUS, cpu_offload=offloaded > 0, cpu_offload_params=offloaded > 1)
        pairs.append((ours, theirs[1]))
    return max(abs(float(ours) / float(theirs) - 1) for ours, theirs in pairs)


def t5_setting(stage: int, offloaded: int) -> Setting:
    return Setting(stage, offloaded > 0, offloaded > 1, GPUS, 1, True, ZeroConfig(stage=stage))


def main() -> int:
    names = ["llama", "llama, checkpointed"] if quick() else list(MODELS)
    with tempfile.TemporaryDirectory() as folder:
        preload_meter(folder)
        rows = [compare(name, stage, folder) for name in names for stage in range(4)]
        del os.environ["LD_PRELOAD"]
    bars = [
        Bar("states_worst_error", max(abs(row["states off %"]) for row in rows) / 100, "<=", 0.02),
        Bar("peak_worst_error", max(abs(row["peak off %"]) for row in rows) / 100, "<=", 0.15),
        Bar("with_margin_to_malloc_least", min(row["with margin / malloc"] for row in rows), ">=", 1.0),
        Bar("needed_to_resident_least", min(row["needed"] / row["resident"] for row in rows), ">=", 1.0),
        Bar("documented_worst_error", documented_error(), "<=", 0.02),
        Bar("installed_deepspeed_worst_error", installed_error(), "<=", 0.02),
    ]
    return report("planner_accuracy", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
