"""One sequence that the scheduler has computed, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from raymodels.serve.engine import GenerateRequest, Token
from raymodels.serve.kv_cache import Row
from raymodels.serve.sampling import Sampler
from raymodels.serve.text import TextStream


@dataclass(eq=False)
class Choice:
    """One sequence being generated. ``row`` is its place in the cache; none while it is parked."""

    request: GenerateRequest
    index: int
    sampler: Sampler
    stream: TextStream
    tokens: list[int]
    row: Row | None = None
    computed: int = 0
    siblings: int = 0
    """Choices of the same request that start from this one's prompt once it is computed."""
    prompt_done: bool = False
    scored: list[Token] = field(default_factory=list)
    """Tokens of the prompt with their log-probabilities, until they are sent."""
    prompt_stream: TextStream | None = None
    """Where the text of the tokens in ``scored`` begins."""
    unsent: list[Token] = field(default_factory=list)
    """New tokens whose text is held back."""
    hidden: torch.Tensor | None = None
    """The sum of the computed tokens' last hidden states, where an embedding is asked for."""

    @property
    def place(self) -> Row:
        assert self.row is not None
        return self.row

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def scores_prompt(self) -> bool:
        return not self.prompt_done and self.request.prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class Computed:
    """What a forward pass made of a choice's next ``count`` tokens: the logits and hidden states that are wanted."""

    choice: Choice
    count: int
    logits: torch.Tensor
    hidden: torch.Tensor | None
