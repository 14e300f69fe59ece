"""Predict the next token. The weight is the number of target tokens."""

from __future__ import annotations

import torch
from torch.nn import functional

from raymodels.data.batches import NO_TARGET, Batch


def weight(batch: Batch) -> int:
    return int((batch["labels"] != NO_TARGET).sum())


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The summed cross-entropy in nats; logits are taken in float32.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each [batch, tokens]; ``labels[:, t]`` is the target of
            ``input_ids[:, t]``, or -100 where there is none.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=NO_TARGET, reduction="sum"
    )
