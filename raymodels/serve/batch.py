"""The scheduler: which sequence computes which tokens in the next forward pass. Plain and synchronous.

Every running choice has tokens that are not computed yet: a prompt's rest, or the one token drawn last. A step takes
one token of each running choice and up to ``prefill_chunk`` prompt tokens through the model together, then draws. Where
memory runs out, the choice that came last is parked: it loses its keys and values and computes them again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import torch

from raymodels.config import EngineConfig
from raymodels.serve.engine import Alternative, Delta, Finish, GenerateRequest, InvalidRequest, Token
from raymodels.serve.grammar import Grammars
from raymodels.serve.kv_cache import Row, Segment
from raymodels.serve.packed_model import PackedModel, Work
from raymodels.serve.release import placed, released
from raymodels.serve.sampling import Sampler, log_probabilities
from raymodels.serve.text import Text, TextStream

Gain = tuple[str, Delta | InvalidRequest]
"""What a step brings a request, by its id."""


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


class Batch:
    """Sequences decoded together."""

    def __init__(self, model: PackedModel, text: Text, grammars: Grammars, config: EngineConfig) -> None:
        self.active: list[Choice] = []
        self.parked: deque[Choice] = deque()
        self.waiting: deque[GenerateRequest] = deque()
        self.tokens_in = self.tokens_out = self.parkings = self.prefix_queries = self.prefix_hits = 0
        self._model, self._cache, self._prefixes = model, model.cache, model.prefixes
        self._text, self._grammars, self._config = text, grammars, config

    @property
    def busy(self) -> bool:
        return bool(self.active or self.parked or self.waiting)

    def add(self, requests: list[GenerateRequest]) -> None:
        """Queue requests; those of a higher priority go before those that wait already."""
        self.waiting = deque(sorted([*self.waiting, *requests], key=lambda request: -request.priority))

    @torch.inference_mode()
    def abort(self, id: str) -> None:
        """Drop all choices of a request, running or not."""
        self.waiting = deque(request for request in self.waiting if request.id != id)
        self.parked = deque(choice for choice in self.parked if choice.request.id != id)
        for choice in [choice for choice in self.active if choice.request.id == id]:
            self._leave(choice)

    @torch.inference_mode()
    def step(self) -> list[Gain]:
        """One forward pass; returns what choices gained."""
        self._admit()
        shares = self._seated(self._share_out())
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
                drawing += [(each, rows[-1]) for each in [choice, *self._prompt_ends(choice)]]
        return self._draw(drawing)

    def _admit(self) -> None:
        """Take in what is parked, then waiting requests in order, each with all its choices, as memory allows."""
        while self.parked and len(self.active) < self._config.max_batch:
            if not self._seat(self.parked[0]):
                return
            self.parked.popleft()
        while self.waiting and not self.parked:
            request = self.waiting[0]
            taken = len(self.active) + sum(choice.siblings for choice in self.active)
            if taken + request.n > self._config.max_batch:
                return
            choice = self._choice(request, index=0)
            choice.siblings = request.n - 1
            if not self._seat(choice):
                return
            self.waiting.popleft()
            self.tokens_in += len(request.tokens)

    def _choice(self, request: GenerateRequest, index: int) -> Choice:
        matcher = self._grammars.matcher(request.grammar) if request.grammar else None
        stream = TextStream(self._text, request.tokens, request.stop)
        return Choice(request, index, Sampler(request.sampling, index, matcher), stream, list(request.tokens))

    def _seat(self, choice: Choice) -> bool:
        """Give a choice a row, with what is known of its tokens already; false if there is no memory."""
        choice.row = self._cache.row(len(choice.tokens))
        if choice.row is None and self._prefixes.positions:
            self._prefixes.drop()
            choice.row = self._cache.row(len(choice.tokens))
        if choice.row is None:
            return False
        self.active.append(choice)
        if not choice.scores_prompt and not choice.request.embed:
            choice.computed = self._prefixes.restore(choice.tokens, choice.row, choice.request.adapter)
            self.prefix_queries += len(choice.tokens)
            self.prefix_hits += choice.computed
        return True

    def _share_out(self) -> list[tuple[Choice, int]]:
        """How many tokens of which choice the next pass computes."""
        shares, left = [(choice, 1) for choice in self.active if choice.pending == 1], self._config.prefill_chunk
        for choice in self.active:
            if choice.pending > 1 and left > 0:
                shares.append((choice, min(choice.pending, left)))
                left -= shares[-1][1]
        return shares

    def _seated(self, shares: list[tuple[Choice, int]]) -> list[tuple[Choice, int]]:
        """The shares for which there is memory, in the order that the cache wants."""
        for choice, count in shares:
            while choice.row and not self._cache.grow(choice.row, choice.computed + count, choice.computed):
                if self._prefixes.positions:
                    self._prefixes.drop()
                else:
                    self._park(self.active[-1])
        fits = [share for share in shares if share[0].row]
        singles = [share for share in fits if share[1] == 1]
        singles.sort(key=lambda share: self._cache.place(Segment(share[0].place, share[0].computed, 1)))
        return singles + [share for share in fits if share[1] > 1]

    def _park(self, choice: Choice) -> None:
        self._leave(choice)
        choice.row, choice.computed, choice.hidden = None, 0, None
        if not choice.prompt_done:
            choice.scored = []
        self.parked.appendleft(choice)
        self.parkings += 1

    def _logits_wanted(self, choice: Choice, count: int) -> int:
        if choice.scores_prompt:
            return count
        return 1 if choice.pending == count else 0

    def _forward(self, shares: list[tuple[Choice, int]]) -> torch.Tensor:
        """Logits, shape (wanted, vocabulary), of the positions each share wants: its last ones."""
        works = [
            Work(
                Segment(choice.place, choice.computed, count),
                choice.tokens[choice.computed :][:count],
                self._logits_wanted(choice, count),
                choice.request.adapter,
            )
            for choice, count in shares
        ]
        embedding = any(choice.request.embed for choice, _ in shares)
        output = self._model.forward(works, hidden=embedding)
        for (choice, _), part in zip(shares, output.hidden or (), strict=embedding):
            if choice.request.embed:
                choice.hidden = part.double().sum(0) + (0 if choice.hidden is None else choice.hidden)
        return output.logits

    def _score(self, choice: Choice, rows: torch.Tensor, count: int) -> None:
        """Add the log-probabilities of the prompt tokens that follow the computed ones, and of the very first."""
        request = choice.request
        assert request.prompt_logprobs is not None
        if not choice.scored:
            choice.scored.append(Token(request.tokens[0], self._text.raw(request.tokens[0]), None, 0, ()))
        following = request.tokens[choice.computed + 1 : choice.computed + count + 1]
        for id, row in zip(following, log_probabilities(rows[: len(following)]), strict=True):
            choice.scored.append(self._token(id, row, request.prompt_logprobs, offset=0))

    def _prompt_ends(self, choice: Choice) -> list[Choice]:
        """Once a choice's prompt is computed: remember it, and start the siblings with copies of it."""
        if choice.prompt_done:
            return []
        choice.prompt_done = True
        self._prefixes.keep(choice.tokens, choice.place, choice.request.adapter)
        siblings = [self._choice(choice.request, index + 1) for index in range(choice.siblings)]
        choice.siblings = 0
        for sibling in siblings:
            sibling.prompt_done, sibling.scored = True, list(choice.scored)
            sibling.row = self._cache.row(len(sibling.tokens))
            if sibling.row is None:
                self.parked.append(sibling)
                continue
            self._cache.copy(choice.place, sibling.row, choice.computed)
            sibling.computed = choice.computed
            self.active.append(sibling)
        return [sibling for sibling in siblings if sibling.row]

    def _draw(self, drawing: list[tuple[Choice, torch.Tensor]]) -> list[Gain]:
        gains: list[Gain] = []
        greedy = torch.stack([row for _, row in drawing]).argmax(dim=-1).tolist() if drawing else []
        for (choice, row), likeliest in zip(drawing, greedy, strict=True):
            if choice not in self.active:  # a sibling has failed, and the whole request with it
                continue
            try:
                delta = self._next(choice, row, likeliest)
            except InvalidRequest as error:
                gains.append((choice.request.id, error))
                self.abort(choice.request.id)
                continue
            if delta is not None:
                gains.append((choice.request.id, delta))
            if delta is not None and delta.finish:
                self._prefixes.keep(choice.tokens[: choice.computed], choice.place, choice.request.adapter)
                self._leave(choice)
        return gains

    def _next(self, choice: Choice, row: torch.Tensor, likeliest: int) -> Delta | None:
        if choice.request.max_tokens == 0:
            return self._delta(choice, "", "length")
        return self._extend(choice, likeliest if choice.sampler.plain else choice.sampler.draw(row), row)

    def _extend(self, choice: Choice, id: int, row: torch.Tensor) -> Delta | None:
        """Add a drawn token to a choice; none while its text is held back."""
        request, stream = choice.request, choice.stream
        choice.tokens.append(id)
        self.tokens_out += 1
        complete = choice.sampler.ends_with(id)
        if id in self._text.ends:
            text = stream.flush()
            if request.logprobs is not None:
                token = self._token(id, log_probabilities(row), request.logprobs, stream.decoded)
                choice.unsent.append(replace(token, end=True))
            return self._delta(choice, text, "stop")
        if request.logprobs is not None:
            choice.unsent.append(self._token(id, log_probabilities(row), request.logprobs, stream.decoded))
        text = stream.push(id)
        finish: Finish | None = "stop" if stream.stopped else None
        if finish is None and (complete or choice.generated == request.max_tokens):
            text += stream.flush()
            finish = "stop" if stream.stopped or complete else "length"
        return self._delta(choice, text, finish)

    def _delta(self, choice: Choice, text: str, finish: Finish | None) -> Delta | None:
        if not (text or finish or choice.scored):
            return None
        ready = released(choice.unsent, choice.stream, finish is not None)
        prompt, choice.scored = placed(self._text, choice.scored), []
        embedding = () if choice.hidden is None else tuple(torch.nn.functional.normalize(choice.hidden, dim=0).tolist())
        return Delta(choice.index, text, choice.generated, ready, finish, prompt, embedding)

    def _token(self, id: int, row: torch.Tensor, alternatives: int, offset: int) -> Token:
        best = row.topk(min(alternatives, row.shape[0]))
        top = tuple(
            Alternative(other, self._text.raw(other), value)
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return Token(id, self._text.raw(id), float(row[id]), offset, top)

    def _leave(self, choice: Choice) -> None:
        self.active.remove(choice)
        self._cache.free(choice.place)
