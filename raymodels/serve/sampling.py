"""Drawing tokens from logits, each choice with its own settings, its own random numbers and its own grammar."""

from __future__ import annotations

from collections import Counter

import torch

from raymodels.serve.engine import Sampling
from raymodels.serve.grammar import Matcher

CANDIDATES = 1024
"""The likeliest tokens that truncation is first tried on: they nearly always hold ``top_p`` of the mass."""


class Bias:
    """A request's ``logit_bias`` as one row, made once for all its choices: of a whole vocabulary it takes 10 ms."""

    def __init__(self, pairs: tuple[tuple[int, float], ...]) -> None:
        self._pairs = pairs
        self._row: torch.Tensor | None = None

    def row(self, vocabulary: int) -> torch.Tensor:
        """What each logit rises by, in double precision."""
        if self._row is None:
            self._row = torch.zeros(vocabulary, dtype=torch.float64)
            if self._pairs:
                ids, values = zip(*self._pairs, strict=True)
                self._row.index_add_(0, torch.tensor(ids), torch.tensor(values, dtype=torch.float64))
        return self._row


class Sampler:
    """Draws one choice's tokens. One uniform number a token, so the batch around it changes nothing.

    ``plain`` tells that the likeliest token of the logits as they are is what `draw` would draw.
    """

    def __init__(
        self, sampling: Sampling, choice: int, matcher: Matcher | None = None, bias: Bias | None = None
    ) -> None:
        self._sampling, self._matcher = sampling, matcher
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._changed = self._penalised or bool(sampling.logit_bias)
        self.plain = sampling.temperature == 0 and not self._changed and matcher is None
        self.bias = bias or Bias(sampling.logit_bias)
        self._changes: torch.Tensor | None = None
        self._drawn: Counter[int] = Counter()
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + choice) % 2**63)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from a row of logits, shape (vocabulary,)."""
        if self._changed:
            logits = logits + self._changes_of(logits)
        id = self._choose(logits if self._matcher is None else self._matcher.forbid(logits))
        if self._penalised:
            self._penalise(id)
        return id

    def ends_with(self, id: int) -> bool:
        """Go on by a drawn token; true if the choice's grammar lets nothing follow it.

        Raises:
            InvalidRequest: the grammar is too complex to follow.
        """
        return self._matcher is not None and self._matcher.accept(id)

    def _changes_of(self, logits: torch.Tensor) -> torch.Tensor:
        """What penalties and biases change of each logit: made for the first token, kept up with each one drawn."""
        if self._changes is None:
            row = self.bias.row(logits.shape[0])
            self._changes = row.to(logits.device, logits.dtype, copy=True)
        return self._changes

    def _penalise(self, id: int) -> None:
        """OpenAI's penalties, mu[j] - c[j] * frequency - (c[j] > 0) * presence, beside the bias."""
        assert self._changes is not None
        self._drawn[id] += 1
        penalty = self._drawn[id] * self._sampling.frequency_penalty + self._sampling.presence_penalty
        self._changes[id] = float(self.bias.row(len(self._changes))[id]) - penalty

    def _choose(self, logits: torch.Tensor) -> int:
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()).double() / self._sampling.temperature  # no overflow, however low it is
        probabilities = torch.softmax(scaled, dim=-1)
        kept, ids = self._truncate(probabilities)
        cumulative = kept.cumsum(0)
        uniform = torch.rand((), generator=self._random, dtype=torch.float64).item() * cumulative[-1].item()
        # Rounding may leave the number on the total; the last token with any mass then stands for it.
        last = int((kept > 0).nonzero()[-1])
        drawn = min(int(torch.searchsorted(cumulative, uniform, right=True)), last)
        return drawn if ids is None else int(ids[drawn])

    def _truncate(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What top_k, then top_p leave, likeliest first, with its ids; none where every token is left in order."""
        top_k, top_p, size = self._sampling.top_k, self._sampling.top_p, probabilities.shape[0]
        if top_p == 1 and not 0 < top_k < size:
            return probabilities, None
        if 0 < top_k < size:
            kept, ids = probabilities.topk(top_k)
        else:
            kept, ids = probabilities.topk(min(CANDIDATES, size))
            if kept.sum() < top_p:
                kept, ids = probabilities.sort(descending=True)
        mass = kept.sum() if 0 < top_k < size else probabilities.sum()
        before = kept.cumsum(0) - kept
        return kept[before < top_p * mass], ids


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Natural log-probabilities of rows of logits, shape (rows, vocabulary), in at least single precision."""
    return torch.log_softmax(logits.float(), dim=-1)
