"""The scheduler: which sequence computes which tokens in the next forward pass. Plain and synchronous.

Every running choice has tokens that are not computed yet: a prompt's rest, or the one token drawn last. A step takes
one token of each running choice and a chunk of prompt tokens through the model together, then draws. Where memory runs
out, the choice that came last is parked: it loses its keys and values and computes them again later.

What goes wrong in computing one request ends that request: its id gains an error, and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from raymodels.config import EngineConfig
from raymodels.serve.choice import Choice, Computed
from raymodels.serve.chunks import Chunks
from raymodels.serve.engine import Alternative, Delta, Finish, GenerateRequest, InvalidRequest, RequestFailed, Token
from raymodels.serve.grammar import Grammars
from raymodels.serve.kv_cache import Segment
from raymodels.serve.packed_model import PackedModel, Work
from raymodels.serve.release import placed, released
from raymodels.serve.sampling import Bias, Sampler, log_probabilities
from raymodels.serve.text import Text, TextStream

log = logging.getLogger(__name__)
Gain = tuple[str, Delta | InvalidRequest | RequestFailed]
"""What a step brings a request, by its id."""
NOT_FINITE = "the model computed values that are not finite (NaN or infinity) for this request"
FAILED = "the model failed to compute this request"


class Batch:
    """Sequences decoded together."""

    def __init__(self, model: PackedModel, text: Text, grammars: Grammars, config: EngineConfig) -> None:
        self.active: list[Choice] = []
        self.parked: deque[Choice] = deque()
        self.waiting: deque[GenerateRequest] = deque()
        self.tokens_in = self.tokens_out = self.parkings = self.prefix_queries = self.prefix_hits = 0
        self._model, self._cache, self._prefixes = model, model.cache, model.prefixes
        self._text, self._grammars, self._config = text, grammars, config
        self._chunks = Chunks(config.prefill_chunk)
        self._gains: list[Gain] = []

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
        """One forward pass; returns what requests gained.

        Raises:
            Exception: whatever makes it impossible to go on, such as the lack of memory.
        """
        began, self._gains = time.perf_counter(), []
        self._admit()
        drawing: list[tuple[Choice, torch.Tensor]] = []
        prompts = {False: 0, True: 0}
        for part in self._forward(self._seated(self._share_out())):
            if part.count > 1:
                prompts[part.choice.scores_prompt] += part.count
            with self._guarded(part.choice.request):
                drawing += self._computed(part)
        self._draw(drawing)
        if drawing or any(prompts.values()):
            self._chunks.measured(time.perf_counter() - began, prompts)
        return self._gains

    @contextmanager
    def _guarded(self, request: GenerateRequest) -> Iterator[None]:
        """What is raised here ends the request, unless it says that nothing more can be computed at all."""
        try:
            yield
        except (InvalidRequest, RequestFailed) as error:
            self._end(request, error)
        except Exception as error:
            if _ends_all(error):
                raise
            log.error("computing a request failed", exc_info=error)
            self._end(request, RequestFailed(FAILED))

    def _end(self, request: GenerateRequest, error: InvalidRequest | RequestFailed) -> None:
        self.abort(request.id)
        self._gains.append((request.id, error))

    def _admit(self) -> None:
        """Take in what is parked, then waiting requests in order, each with all its choices, as memory allows."""
        while self.parked and len(self.active) < self._config.max_batch:
            parked = self.parked[0]
            with self._guarded(parked.request):
                if not self._seat(parked):
                    return
                self.parked.popleft()
        while self.waiting and not self.parked:
            request = self.waiting[0]
            taken = len(self.active) + sum(choice.siblings for choice in self.active)
            if taken + request.n > self._config.max_batch:
                return
            with self._guarded(request):
                choice = self._choice(request, 0, Bias(request.sampling.logit_bias))
                choice.siblings = request.n - 1
                if not self._seat(choice):
                    return
                self.waiting.popleft()
                self.tokens_in += len(request.tokens)

    def _choice(self, request: GenerateRequest, index: int, bias: Bias) -> Choice:
        matcher = self._grammars.matcher(request.grammar) if request.grammar else None
        stream = TextStream(self._text, request.tokens, request.stop)
        return Choice(request, index, Sampler(request.sampling, index, matcher, bias), stream, list(request.tokens))

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
        """How many tokens of which choice the next pass computes: of prompts, what running streams can wait for."""
        shares, left = [(choice, 1) for choice in self.active if choice.pending == 1], 1.0
        streams = bool(shares)
        for choice in self.active:
            most = self._chunks.size(choice.scores_prompt) if streams else self._config.prefill_chunk
            if choice.pending > 1 and left > 0:
                shares.append((choice, min(choice.pending, max(1, int(left * most)))))
                left -= shares[-1][1] / most
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
            choice.scored, choice.prompt_stream = [], None
        self.parked.appendleft(choice)
        self.parkings += 1

    def _logits_wanted(self, choice: Choice, count: int) -> int:
        if choice.scores_prompt:
            return count
        return 1 if choice.pending == count else 0

    def _forward(self, shares: list[tuple[Choice, int]]) -> Iterator[Computed]:
        """What a pass computes of each share; of each one alone, if together they make the model fail."""
        if not shares:
            return
        try:
            together = self._pass(shares)
        except Exception as error:
            if _ends_all(error):
                raise
            log.error("a forward pass failed: its %d sequences are computed one by one", len(shares), exc_info=error)
            for choice, count in shares:
                if choice in self.active:
                    with self._guarded(choice.request):
                        yield from self._pass([(choice, count)])
            return
        yield from (part for part in together if part.choice in self.active)

    def _pass(self, shares: list[tuple[Choice, int]]) -> list[Computed]:
        wanted = [self._logits_wanted(choice, count) for choice, count in shares]
        works = [
            Work(
                Segment(choice.place, choice.computed, count),
                choice.tokens[choice.computed :][:count],
                want,
                choice.request.adapter,
            )
            for (choice, count), want in zip(shares, wanted, strict=True)
        ]
        output = self._model.forward(works, hidden=any(choice.request.embed for choice, _ in shares))
        hidden = output.hidden or [None] * len(shares)
        logits = torch.split(output.logits, wanted)
        return [Computed(*share, rows, states) for share, rows, states in zip(shares, logits, hidden, strict=True)]

    def _computed(self, part: Computed) -> list[tuple[Choice, torch.Tensor]]:
        """Take over what was computed of a choice; the choices that a token can be drawn for now, with its logits."""
        choice = part.choice
        if choice.scores_prompt:
            self._score(choice, part.logits, part.count)
        if choice.request.embed and part.hidden is not None:
            choice.hidden = part.hidden.double().sum(0) + (0 if choice.hidden is None else choice.hidden)
        choice.computed += part.count
        if choice.pending:
            return []
        return [(each, part.logits[-1]) for each in [choice, *self._prompt_ends(choice)]]

    def _score(self, choice: Choice, rows: torch.Tensor, count: int) -> None:
        """Add the log-probabilities of the prompt tokens that follow the computed ones, and of the very first."""
        request, found = choice.request, list[Token]()
        assert request.prompt_logprobs is not None
        if choice.prompt_stream is None:
            choice.prompt_stream = TextStream(self._text)
            found.append(Token(request.tokens[0], self._text.raw(request.tokens[0]), None, 0, ()))
        following = request.tokens[choice.computed + 1 : choice.computed + count + 1]
        if following:
            found += self._tokens(following, rows[: len(following)], request.prompt_logprobs)
        choice.scored += placed(choice.prompt_stream, found)

    def _prompt_ends(self, choice: Choice) -> list[Choice]:
        """Once a choice's prompt is computed: remember it, and start the siblings with copies of it."""
        if choice.prompt_done:
            return []
        choice.prompt_done = True
        self._prefixes.keep(choice.tokens, choice.place, choice.request.adapter)
        bias = choice.sampler.bias
        siblings = [self._choice(choice.request, index + 1, bias) for index in range(choice.siblings)]
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

    def _draw(self, drawing: list[tuple[Choice, torch.Tensor]]) -> None:
        if not drawing:
            return
        rows = torch.stack([row for _, row in drawing])
        likeliest = rows.argmax(dim=-1)  # which takes a NaN for the largest
        finite = rows.gather(1, likeliest[:, None])[:, 0].isfinite().tolist()
        for (choice, row), id, sound in zip(drawing, likeliest.tolist(), finite, strict=True):
            if choice in self.active:  # else a sibling has failed, and the whole request with it
                with self._guarded(choice.request):
                    self._gain(choice, row, id, sound)

    def _gain(self, choice: Choice, row: torch.Tensor, likeliest: int, sound: bool) -> None:
        """Give a choice its next token, and its listener what there is to send."""
        if not sound:
            raise RequestFailed(NOT_FINITE)
        delta = self._next(choice, row, likeliest)
        if delta is not None:
            self._gains.append((choice.request.id, delta))
        if delta is not None and delta.finish:
            self._prefixes.keep(choice.tokens[: choice.computed], choice.place, choice.request.adapter)
            self._leave(choice)

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
                choice.unsent.append(replace(self._token(choice, id, row, request.logprobs), end=True))
            return self._delta(choice, text, "stop")
        if request.logprobs is not None:
            choice.unsent.append(self._token(choice, id, row, request.logprobs))
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
        prompt, choice.scored, choice.prompt_stream = tuple(choice.scored), [], None
        if choice.hidden is not None and not choice.hidden.isfinite().all():
            raise RequestFailed(NOT_FINITE)
        embedding = () if choice.hidden is None else tuple(torch.nn.functional.normalize(choice.hidden, dim=0).tolist())
        return Delta(choice.index, text, choice.generated, ready, finish, prompt, embedding)

    def _token(self, choice: Choice, id: int, row: torch.Tensor, alternatives: int) -> Token:
        [token] = self._tokens([id], row[None], alternatives)
        return replace(token, offset=choice.stream.decoded)

    def _tokens(self, ids: list[int], rows: torch.Tensor, alternatives: int) -> list[Token]:
        """Tokens with their log-probabilities, each by its row of logits; their offsets are not known here."""
        scores = log_probabilities(rows)
        own = scores.gather(1, torch.tensor(ids, device=rows.device)[:, None])[:, 0]
        if own.isnan().any():
            raise RequestFailed(NOT_FINITE)
        best = scores.topk(min(alternatives, scores.shape[1]), dim=1)
        return [
            Token(id, self._text.raw(id), value, 0, tuple(map(self._alternative, top, values)))
            for id, value, top, values in zip(
                ids, own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]

    def _alternative(self, id: int, logprob: float) -> Alternative:
        return Alternative(id, self._text.raw(id), logprob)

    def _leave(self, choice: Choice) -> None:
        self.active.remove(choice)
        self._cache.free(choice.place)


def _ends_all(error: Exception) -> bool:
    """Whether an error is not of one request: there is no memory, or the accelerator has failed."""
    without_memory = "DefaultCPUAllocator" in str(error)  # a plain RuntimeError, unlike a GPU's
    return without_memory or isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError)
