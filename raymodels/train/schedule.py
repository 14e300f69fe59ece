"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from raymodels.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimizer step ``step``, counted from 0: a linear warm-up to ``lr``, then the schedule.

    Cosine and linear reach ``lr * min_lr_ratio`` after the last step.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    kept = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * kept)
