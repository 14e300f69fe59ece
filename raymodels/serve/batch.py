"""The scheduler: which sequence computes which tokens in the next forward pass. Plain and synchronous.

Every running choice has tokens that are not computed yet: a prompt's rest, or the one token drawn last. A step takes
one token of each running choice and up to ``prefill_chunk`` prompt tokens through the model together, then draws.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from raymodels.serve.engine import Alternative, Delta, Finish, GenerateRequest, Token
from raymodels.serve.kv_cache import KVCache, Segment
from raymodels.serve.sampling import Sampler, log_probabilities
from raymodels.serve.text import Text, TextStream


@dataclass(eq=False)
class Choice:
    """One sequence being generated. Its row in the cache is its place in `Batch.active`."""

    request: GenerateRequest
    index: int
    row: int
    sampler: Sampler
    stream: TextStream
    tokens: list[int]
    computed: int = 0
    siblings: int = 0
    """Choices of the same request that start from this one's prompt once it is computed."""
    scored: list[Token] = field(default_factory=list)
    """Tokens of the prompt with their log-probabilities, until they are sent."""
    unsent: list[Token] = field(default_factory=list)
    """New tokens whose text is held back."""

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def in_prompt(self) -> bool:
        return self.computed < len(self.request.tokens)

    @property
    def scores_prompt(self) -> bool:
        return self.in_prompt and self.request.prompt_logprobs is not None


class Batch:
    """Sequences decoded together.

    Args:
        model: a transformers causal language model whose attention is `kv_cache.packed_attention`.
        ends: token ids that end a choice.
        max_choices: sequences that may run at once.
        prefill_chunk: prompt tokens in one step.
    """

    def __init__(
        self, model: Any, cache: KVCache, text: Text, ends: frozenset[int], max_choices: int, prefill_chunk: int
    ) -> None:
        self.active: list[Choice] = []
        self.waiting: deque[GenerateRequest] = deque()
        self.tokens_in = 0
        self.tokens_out = 0
        self._model, self._cache, self._text, self._ends = model, cache, text, ends
        self._max_choices, self._prefill_chunk = max_choices, prefill_chunk

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    @torch.inference_mode()
    def abort(self, id: str) -> None:
        """Drop all choices of a request, running or not."""
        self.waiting = deque(request for request in self.waiting if request.id != id)
        for choice in [choice for choice in self.active if choice.request.id == id]:
            self._remove(choice)

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Delta]]:
        """One forward pass; returns what choices gained, by request id."""
        self._admit()
        shares = self._share_out()
        if not shares:
            return []
        logits = self._forward(shares)
        drawing: list[tuple[Choice, torch.Tensor]] = []
        for choice, count in shares:
            wanted = self._logits_wanted(choice, count)
            rows, logits = logits[:wanted], logits[wanted:]
            if choice.scores_prompt:
                self._score(choice, rows, count)
            choice.computed += count
            if not choice.pending:
                drawing += [(each, rows[-1]) for each in [choice, *self._fork(choice)]]
        return self._draw(drawing)

    def _admit(self) -> None:
        """Take in waiting requests in order, each with all its choices."""
        while self.waiting:
            request = self.waiting[0]
            taken = len(self.active) + sum(choice.siblings for choice in self.active)
            if taken + request.n > self._max_choices:
                return
            self.waiting.popleft()
            self.tokens_in += len(request.tokens)
            choice = self._choice(request, index=0)
            choice.siblings = request.n - 1

    def _choice(self, request: GenerateRequest, index: int) -> Choice:
        sampler = Sampler(request.sampling, index)
        stream = TextStream(self._text, request.tokens, request.stop)
        choice = Choice(request, index, len(self.active), sampler, stream, list(request.tokens))
        self.active.append(choice)
        return choice

    def _share_out(self) -> list[tuple[Choice, int]]:
        """How many tokens of which choice the next pass computes; single tokens first, as the cache wants them."""
        singles = [(choice, 1) for choice in self.active if choice.pending == 1]
        chunks, left = [], self._prefill_chunk
        for choice in self.active:
            if choice.pending > 1 and left > 0:
                chunks.append((choice, min(choice.pending, left)))
                left -= chunks[-1][1]
        return singles + [share for share in chunks if share[1] == 1] + [share for share in chunks if share[1] > 1]

    def _logits_wanted(self, choice: Choice, count: int) -> int:
        if choice.scores_prompt:
            return count
        return 1 if choice.pending == count else 0

    def _forward(self, shares: list[tuple[Choice, int]]) -> torch.Tensor:
        """Logits, shape (wanted, vocabulary), of the positions each share wants: its last ones."""
        packed = [token for choice, count in shares for token in choice.tokens[choice.computed :][:count]]
        ends = torch.tensor([count for _, count in shares]).cumsum(0).tolist()
        wanted = [
            position
            for (choice, count), end in zip(shares, ends, strict=True)
            for position in range(end - self._logits_wanted(choice, count), end)
        ]
        device = self._cache.device
        positions = self._cache.plan([Segment(choice.row, choice.computed, count) for choice, count in shares])
        output = self._model(
            input_ids=torch.tensor([packed], device=device),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            kv_cache=self._cache,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _score(self, choice: Choice, rows: torch.Tensor, count: int) -> None:
        """Add the log-probabilities of the prompt tokens that follow the computed ones, and of the very first."""
        request = choice.request
        assert request.prompt_logprobs is not None
        if not choice.scored:
            choice.scored.append(Token(request.tokens[0], self._text.raw(request.tokens[0]), None, 0, ()))
        following = request.tokens[choice.computed + 1 : choice.computed + count + 1]
        for id, row in zip(following, log_probabilities(rows[: len(following)]), strict=True):
            choice.scored.append(self._token(id, row, request.prompt_logprobs, offset=0))

    def _fork(self, choice: Choice) -> list[Choice]:
        """The siblings of a choice whose prompt was just computed, with copies of its keys and values."""
        siblings = [self._choice(choice.request, index + 1) for index in range(choice.siblings)]
        choice.siblings = 0
        for sibling in siblings:
            self._cache.copy(choice.row, sibling.row, choice.computed)
            sibling.computed, sibling.scored = choice.computed, list(choice.scored)
        return siblings

    def _draw(self, drawing: list[tuple[Choice, torch.Tensor]]) -> list[tuple[str, Delta]]:
        deltas = []
        greedy = torch.stack([row for _, row in drawing]).argmax(dim=-1).tolist() if drawing else []
        for (choice, row), likeliest in zip(drawing, greedy, strict=True):
            if choice.request.max_tokens == 0:
                delta = self._delta(choice, "", "length")
            else:
                delta = self._extend(choice, likeliest if choice.sampler.greedy else choice.sampler.draw(row), row)
            if delta is not None:
                deltas.append((choice.request.id, delta))
            if delta is not None and delta.finish:
                self._remove(choice)
        return deltas

    def _extend(self, choice: Choice, id: int, row: torch.Tensor) -> Delta | None:
        """Add a drawn token to a choice; none while its text is held back."""
        request, stream = choice.request, choice.stream
        choice.tokens.append(id)
        self.tokens_out += 1
        if id in self._ends:
            return self._delta(choice, stream.flush(), "stop")
        if request.logprobs is not None:
            choice.unsent.append(self._token(id, log_probabilities(row), request.logprobs, stream.decoded))
        text = stream.push(id)
        finish: Finish | None = "stop" if stream.stopped else None
        if finish is None and choice.generated == request.max_tokens:
            text += stream.flush()
            finish = "stop" if stream.stopped else "length"
        return self._delta(choice, text, finish)

    def _delta(self, choice: Choice, text: str, finish: Finish | None) -> Delta | None:
        if not (text or finish or choice.scored):
            return None
        # A token goes out with the first character of its text; one that a stop string cut off whole does not.
        whole = finish is not None and not choice.stream.stopped
        ready = [token for token in choice.unsent if whole or token.offset < choice.stream.released]
        choice.unsent = choice.unsent[len(ready) :]
        prompt, choice.scored = tuple(self._with_offsets(choice.scored)), []
        return Delta(choice.index, text, choice.generated, tuple(ready), finish, prompt)

    def _token(self, id: int, row: torch.Tensor, alternatives: int, offset: int) -> Token:
        best = row.topk(min(alternatives, row.shape[0]))
        top = tuple(
            Alternative(other, self._text.raw(other), value)
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return Token(id, self._text.raw(id), float(row[id]), offset, top)

    def _with_offsets(self, tokens: list[Token]) -> list[Token]:
        stream, placed = TextStream(self._text), []
        for token in tokens:
            placed.append(replace(token, offset=stream.decoded))
            stream.push(token.id)
        return placed

    def _remove(self, choice: Choice) -> None:
        """Free a choice's row. The last row moves into the hole, so that rows stay side by side."""
        last = self.active.pop()
        if last is not choice:
            self._cache.copy(last.row, choice.row, last.computed)
            self.active[choice.row] = last
            last.row = choice.row
