"""Drawing tokens from logits, each choice with its own settings and its own random numbers."""

from __future__ import annotations

import torch

from raymodels.serve.engine import Sampling

CANDIDATES = 1024
"""The likeliest tokens that truncation is first tried on: they nearly always hold ``top_p`` of the mass."""


class Sampler:
    """Draws one choice's tokens. One uniform number a token, so the batch around it changes nothing."""

    def __init__(self, sampling: Sampling, choice: int) -> None:
        self.greedy = sampling.temperature == 0
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + choice) % 2**63)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from a row of logits, shape (vocabulary,)."""
        if self.greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.double() / self._sampling.temperature, dim=-1)
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
