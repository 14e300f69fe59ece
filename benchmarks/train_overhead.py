"""What raymodels costs a training step: beside a bare torch.distributed + DeepSpeed script, step by step in one run.

Both train the demo's model on the same samples with the same DeepSpeed config, in the same two processes, taking turns:
one step of raymodels' own loop, reporting at every step, then one of the script. Timed is all that lies between turns.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from benchmarks.report import Bar, quick, report
from raymodels.config import Config, load
from raymodels.data.prepare import prepare
from raymodels.testing import run_ranks

WORKERS = 2
WARM_UP = 5


class BareScript:
    """What one writes without raymodels: initialise DeepSpeed, slice the tokens, step."""

    def __init__(
        self, config: Config, prepared_place: str, ds_config: dict[str, Any], weights: dict[str, torch.Tensor]
    ) -> None:
        import deepspeed
        from transformers import LlamaForCausalLM

        from raymodels.data.dataset import open_prepared
        from raymodels.models.build import architecture
        from raymodels.train.engine import parameter_groups

        prepared = open_prepared(prepared_place)
        self.split = prepared.split("train", config.data.seq_len, config.data.pack)
        self.config = config
        shape = architecture(
            config.model, vocab_size=prepared.vocab_size, seq_len=config.data.seq_len, eos_id=prepared.eos_id
        )
        model = LlamaForCausalLM(shape)
        model.config.use_cache = False
        model.load_state_dict(weights)
        groups = parameter_groups(model, config.train.weight_decay)
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)

    def step(self, ids: np.ndarray[Any, Any], lr: float) -> float:
        """One optimizer step on this rank's samples; the global mean loss before it."""
        micro_batch, targets = self.config.train.micro_batch, self.config.train.global_batch * self.config.data.seq_len
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(ids), micro_batch):
            rows = np.stack([self.split.sample(int(i)) for i in ids[start : start + micro_batch]])
            tokens = torch.from_numpy(rows)
            logits = self.engine(input_ids=tokens[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            self.engine.backward(loss * (WORKERS / targets), scale_wrt_gas=False)
            self.engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / targets


def alternate(config: Config, prepared_place: str) -> dict[str, list[float]]:
    """Seconds and losses of both, step by step."""
    from raymodels.data.order import sample_ids, shard
    from raymodels.train import loop, zero
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.schedule import learning_rate
    from raymodels.train.signals import Signals

    phases = Phases()
    session = loop.open_session(config, prepared_place, phases, warnings.warn)
    ds_config = zero.deepspeed_config(config, WORKERS)
    bare = BareScript(config, prepared_place, ds_config, session.engine.module.state_dict())
    found: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "our_loss", "bare_loss")}
    turn = time.perf_counter()

    def after_our_step(metrics: dict[str, Any]) -> None:
        nonlocal turn
        dist.barrier()
        found["ours"].append(time.perf_counter() - turn)
        found["our_loss"].append(metrics["loss"])
        step, start = metrics["step"] - 1, time.perf_counter()
        ids = sample_ids(config.run.seed, step, config.train.global_batch, len(bare.split))
        mine, _ = shard(ids, dist.get_rank(), WORKERS)
        found["bare_loss"].append(bare.step(mine, learning_rate(config.train, step)))
        dist.barrier()
        found["bare"].append(time.perf_counter() - start)
        turn = time.perf_counter()

    with Signals(config.place, 1) as signals:
        interval = Interval(config.checkpoint.every, WORKERS, 0, 0.0, time.monotonic())
        loop.train(session, phases, after_our_step, signals, interval)
    return found


def main() -> int:
    steps = 20 if quick() else 60
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            Path(__file__).parents[1] / "jobs/configs/demo.yaml",
            [
                f"run.storage={folder}",
                f"data.prepared={folder}",
                # Large enough that no step meets the last sample, the only short one: the script pads none.
                f"data.source={sysconfig.get_path('stdlib')}/*.py",
                "data.eval_fraction=0.2",
                f"train.steps={steps}",
                "train.report_every=1",
                # Neither belongs to a step, and both happen at the last one, which is left out below.
                f"checkpoint.every={steps}",
                f"eval.every={steps}",
            ],
        )
        [found, _] = run_ranks(alternate, WORKERS, config, prepare(config).place)
    timed = slice(WARM_UP, steps - 1)
    ours, bare = statistics.median(found["ours"][timed]), statistics.median(found["bare"][timed])
    pairs = [a / b for a, b in zip(found["ours"][timed], found["bare"][timed], strict=True)]
    difference = max(abs(a - b) for a, b in zip(found["our_loss"], found["bare_loss"], strict=True))
    rows = [
        {"trainer": "bare script", "median step s": bare, "last loss": found["bare_loss"][-1]},
        {"trainer": "raymodels", "median step s": ours, "last loss": found["our_loss"][-1]},
    ]
    bars = [
        Bar("largest_loss_difference", difference, "==", 0.0),
        Bar("median_step_ratio", statistics.median(pairs), "<=", 1.02),
    ]
    return report("train_overhead", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
