"""What to do when the loss is no number or grows: a pure policy, asked on every rank at every step.

All ranks must ask with the same figures, those of the global batch; then they get the same answer.

A loss diverges if it stays over ``factor`` times the median of the last ``window`` good losses for ``patience`` steps
in a row. The median is robust: neither noise nor a single bad batch moves it (F. Hampel, "The influence curve and its
role in robust estimation", JASA 69, 1974). Bad losses do not enter it, so that it does not follow a loss that grows.
Losses fall steeply at the start, so the rule is off until the window is full and the learning rate has warmed up.

An update that was made cannot be taken back, so the remedy is always a checkpoint before it. Going back alone would
change nothing, since the same samples come again in the same order; so batches are dropped on the second way through,
as was done for PaLM (A. Chowdhery et al., JMLR 24, 2023, 5.1): with ``skip`` the one bad batch, with ``rollback`` all
from the first bad step to the last. A dropped batch counts as its step: learning rate and sample order go on as if it
had been taken. Which batches are dropped is kept in ``dropped.json`` in the run directory.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.config import TrainConfig
from raymodels.errors import Diverged

DROPPED = "dropped.json"

Action = Literal["go_on", "roll_back", "stop"]
Steps = tuple[int, int]


@dataclass(frozen=True)
class Decision:
    """What to do; ``reason`` says why, ``back_to`` and ``drop`` are those of `raymodels.errors.Diverged`."""

    action: Action
    reason: str = ""
    back_to: int | None = None
    drop: Steps | None = None

    def error(self) -> Diverged:
        """What to raise for ``stop`` and ``roll_back``."""
        return Diverged(self.reason, self.back_to, self.drop)


GO_ON = Decision("go_on")


class Divergence:
    """The policy of one attempt.

    Args:
        dropped: first and last steps whose batches to drop, one pair for each time the run went back.
        memory: what `memory` gave when the checkpoint was saved from which the attempt goes on.
    """

    def __init__(
        self, train: TrainConfig, dropped: Sequence[Steps] = (), memory: Mapping[str, Any] | None = None
    ) -> None:
        self._train, self._settings, self._dropped = train, train.divergence, dropped
        memory = memory or {"losses": (), "bad_since": None}
        self._losses = deque[float](memory["losses"], maxlen=self._settings.window)
        self._bad_since: int | None = memory["bad_since"]

    def memory(self) -> dict[str, Any]:
        """What the next decisions depend on, as plain data: an interrupted run decides as an undisturbed one."""
        return {"losses": list(self._losses), "bad_since": self._bad_since}

    def drops(self, step: int) -> bool:
        """Whether the batch of a step, counted from 0, is to be dropped."""
        return any(first <= step <= last for first, last in self._dropped)

    def judge(self, step: int, loss: float, grad_norm: float) -> Decision:
        """What to do about a step that was taken, by its loss (mean over the global batch) and gradient norm.

        In fp16 a norm that is no number is how the loss scale is found, and means nothing.
        """
        if not math.isfinite(loss):
            return self._bad(step, f"the loss is {loss} at step {step + 1}")
        if not math.isfinite(grad_norm) and self._train.precision != "fp16":
            return self._bad(step, f"the gradient is no number at step {step + 1}")
        if loss <= self._limit(step):
            self._losses.append(loss)
            self._bad_since = None
            return GO_ON
        text = (
            f"the loss is {loss:.4g} at step {step + 1}, over {self._settings.factor:g} times its running median "
            f"{statistics.median(self._losses):.4g}"
        )
        if self._bad_since is None:
            self._bad_since = step
        in_a_row = step - self._bad_since + 1
        if self._train.on_divergence != "skip" and in_a_row < self._settings.patience:
            return GO_ON
        return self._bad(step, text + (f", for {in_a_row} steps in a row" if in_a_row > 1 else ""))

    def _limit(self, step: int) -> float:
        """The highest loss that is still good."""
        if step < self._train.warmup_steps or len(self._losses) < self._settings.window:
            return math.inf
        return self._settings.factor * statistics.median(self._losses)

    def _bad(self, step: int, text: str) -> Decision:
        first = step if self._bad_since is None else self._bad_since
        if self._train.on_divergence == "stop":
            return Decision("stop", f"{text}: lower train.lr, raise train.warmup_steps, or set train.on_divergence")
        skip = self._train.on_divergence == "skip"
        limit = "max_skips" if skip else "max_rollbacks"
        if len(self._dropped) >= getattr(self._settings, limit):
            return Decision(
                "stop",
                f"{text}, and the run went back {len(self._dropped)} times before: lower train.lr, mend the data, or "
                f"raise train.divergence.{limit}",
            )
        if skip:
            return Decision("roll_back", f"{text}: going back to drop its batch", step, (step, step))
        back_to = max(0, first - self._settings.rollback_steps)
        text += f": going back to step {back_to} or before, to drop the batches of {first + 1} to {step + 1}"
        return Decision("roll_back", text, back_to, (first, step))


def dropped(run: str) -> list[Steps]:
    """The steps whose batches a run drops."""
    place = storage.join(run, DROPPED)
    return [(first, last) for first, last in storage.read_json(place)] if storage.exists(place) else []


def go_back(run: str, diverged: Diverged) -> None:
    """Have a run's next attempt start from a checkpoint before the steps that went wrong, and drop their batches."""
    assert diverged.back_to is not None and diverged.drop is not None, diverged
    storage.write_json(storage.join(run, DROPPED), [*dropped(run), diverged.drop])
    for checkpoint in layout.committed(run):
        if checkpoint.step > diverged.back_to:
            layout.disown(checkpoint, str(diverged))
