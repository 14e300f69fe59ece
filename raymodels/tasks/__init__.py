"""One file a task. A task says what a batch's loss is and what it weighs; the loop knows no more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Task(Protocol):
    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        """How much a batch counts in the mean: its target tokens, or its examples."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The *sum* of the batch's losses, a scalar with gradient; its mean is over `weight`."""


def task(kind: str) -> Task:
    from raymodels.tasks import causal_lm

    return {"causal_lm": causal_lm}[kind]
