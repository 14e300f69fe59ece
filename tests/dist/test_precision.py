"""Half precision at ZeRO stage 0, where DeepSpeed has an optimizer of its own, against stage 1: the same computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymodels.config import Config
from raymodels.testing import run_ranks, train_here
from tests.conftest import altered

STEPS = 3
# DeepSpeed takes a CPU's fp16 only where oneDNN computes in it.
PRECISIONS = ["bf16", *(["fp16"] if torch.ops.mkldnn._is_mkldnn_fp16_supported() else [])]


def config(tiny: dict[str, Any], folder: Path, stage: int, precision: str) -> Config:
    train = {"steps": STEPS + 1, "warmup_steps": 0, "weight_decay": 0.5, "clip_norm": 0.1}
    made = altered(tiny, folder / f"{stage}-{precision}", train=train, zero={"stage": stage}, workers={"count": 1})
    # Set past the check that refuses fp16 on CPUs.
    return made.model_copy(update={"train": made.train.model_copy(update={"precision": precision})})


def trained(config: Config, prepared: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], int]:
    """Loss and gradient norm of each step, the float32 weights, and AdamW's count."""
    from raymodels.checkpoint import fragments

    session, reports = train_here(config, prepared, until=STEPS)
    masters = {f.name: f.tensors["master"].clone() for f in fragments.fragments(session.engine)}
    return [(r["loss"], r["grad_norm"]) for r in reports], masters, fragments.adam_step(session.engine)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stage_0_computes_what_stage_1_does(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, precision: str
) -> None:
    [(expected, weights, count)] = run_ranks(trained, 1, config(tiny, tmp_path, 1, precision), prepared)
    [(found, own_weights, own_count)] = run_ranks(trained, 1, config(tiny, tmp_path, 0, precision), prepared)
    assert (own_count, count) == (STEPS, STEPS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)  # half-precision gradients are added in another order
    assert own_weights.keys() == weights.keys()
    for name, weight in weights.items():
        # AdamW moves a weight by lr a step at most, 1e-2 here: a first update of 0.735 times that would be 2.6e-3 off.
        torch.testing.assert_close(own_weights[name], weight, rtol=0, atol=5e-4, msg=lambda text, n=name: f"{n}: {text}")
