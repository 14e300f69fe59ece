"""Drawing tokens from logits, each choice with its own settings, its own random numbers and its own grammar."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch

from raymodels.serve.engine import Sampling
from raymodels.serve.grammar import Matcher

CANDIDATES = 1024
"""The likeliest tokens that truncation is first tried on: they nearly always hold ``top_p`` of the mass."""


class Sampler:
    """Draws one choice's tokens. One uniform number a token, so the batch around it changes nothing.

    ``plain`` tells that the likeliest token of the logits as they are is what `draw` would draw.
    """

    def __init__(self, sampling: Sampling, choice: int, matcher: Matcher | None = None) -> None:
        self._sampling, self._matcher = sampling, matcher
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._adjusted = self._penalised or bool(sampling.logit_bias) or matcher is not None
        self.plain = sampling.temperature == 0 and not self._adjusted
        self._drawn: Counter[int] = Counter()
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + choice) % 2**63)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from a row of logits, shape (vocabulary,)."""
        id = self._choose(self._adjust(logits) if self._adjusted else logits)
        if self._penalised:
            self._drawn[id] += 1
        return id

    def ends_with(self, id: int) -> bool:
        """Go on by a drawn token; true if the choice's grammar lets nothing follow it.

        Raises:
            InvalidRequest: the grammar is too complex to follow.
        """
        return self._matcher is not None and self._matcher.accept(id)

    def _adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """OpenAI's penalties, mu[j] - c[j] * frequency - (c[j] > 0) * presence, and biases; then the grammar."""
        sampling, changes = self._sampling, defaultdict[int, float](float)
        for id, times in self._drawn.items():
            changes[id] -= times * sampling.frequency_penalty + sampling.presence_penalty
        for id, bias in sampling.logit_bias:
            changes[id] += bias
        if changes:
            ids = torch.tensor(list(changes), device=logits.device)
            values = torch.tensor(list(changes.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.index_add(0, ids, values)
        return logits if self._matcher is None else self._matcher.forbid(logits)

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
