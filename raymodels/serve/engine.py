"""The engine seam: token ids in, text and log-probabilities out. Knows neither HTTP nor Ray.

An engine decodes many requests together. What it promises to every one of them: the same result as if it were alone,
deltas in order, and its place freed within one step once nobody listens.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from raymodels.errors import RaymodelsError
from raymodels.serve.text import Text

Finish = Literal["stop", "length"]
NO_ADAPTERS: Mapping[str, str] = MappingProxyType({})


class InvalidRequest(RaymodelsError):
    """A request that this engine can never serve; ``field`` is the part of it at fault."""

    def __init__(self, message: str, field: str, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class QueueFull(RaymodelsError):
    """As many requests wait as may; the same request succeeds later."""


class RequestFailed(RaymodelsError):
    """Computing one request failed; the engine goes on with the others. The message holds nothing of the request."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in.

    A logit falls by ``presence_penalty`` once its token was generated and by ``frequency_penalty`` for each time, and
    rises by its ``logit_bias``, given as (token id, bias), as in OpenAI's API.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a choice's text must match: a JSON schema (as JSON text), or a grammar in llguidance's Lark dialect."""

    kind: Literal["json_schema", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt and what to make of it.

    Args:
        id: unique among the requests in flight; `Engine.abort` takes it.
        tokens: the prompt, at least one token.
        max_tokens: new tokens per choice; 0 only scores the prompt.
        n: independent choices; choice ``i`` draws from ``sampling.seed + i``.
        stop: strings that end a choice and are not part of its text.
        logprobs: alternatives reported beside each new token; none reports no log-probabilities.
        prompt_logprobs: the same for the tokens of the prompt.
        grammar: what every choice's text must match.
        priority: requests of a higher one leave the queue first.
        embed: the prompt's embedding comes with the last delta.
        adapter: the name of the one that is added to the model; none for the model alone.
    """

    id: str
    tokens: list[int]
    max_tokens: int
    n: int = 1
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    embed: bool = False
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood here. ``raw`` holds its bytes: a token may be part of a character."""

    id: int
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its natural log-probability under the model, before temperature and truncation.

    ``logprob`` is none for a prompt's first token. ``offset`` counts characters from where its text began. ``end``
    marks the token that ended the text: it is generated like any other, but no part of the text.
    """

    id: int
    raw: bytes
    logprob: float | None
    offset: int
    top: tuple[Alternative, ...]
    end: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained. Text arrives in whole characters and never holds a part of a stop string.

    ``generated`` counts the tokens of the choice so far, ``prompt`` comes with the choice's first delta if asked for,
    ``embedding`` with the last.
    """

    choice: int
    text: str
    generated: int
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt: tuple[Token, ...] = ()
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Choices running and requests queued now, tokens since the start, and memory for keys and values.

    ``prefix_hits`` of the ``prefix_queries`` prompt tokens that were looked up were found computed. ``parkings`` counts
    how often a choice had to give its memory up to others. ``kv_usage`` is of 1.
    """

    running: int
    queued: int
    tokens_in: int
    tokens_out: int
    prefix_queries: int = 0
    prefix_hits: int = 0
    parkings: int = 0
    kv_usage: float = 0.0


class Engine(ABC):
    """What the layers above may ask of any engine."""

    context: int
    """Most tokens of prompt and output together."""
    text: Text
    """The model's tokenizer."""
    vocabulary: int
    """Tokens that the model has embeddings for; the tokenizer may have more of them, or less."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Queue a request now; its deltas follow until every choice has finished. Closing the iterator aborts it.

        The iterator raises `InvalidRequest` where that shows only as the request is computed, and `RequestFailed`.

        Raises:
            InvalidRequest: it can never be served.
            QueueFull: it could be later.
        """

    @abstractmethod
    async def compile(self, grammar: Grammar) -> Grammar:
        """The grammar, compiled, as `generate` takes it: given another, it compiles it while nothing else goes on.

        Raises:
            InvalidRequest: it cannot be compiled, or takes too long or too much memory; says why.
            QueueFull: it could be later.
        """

    @abstractmethod
    async def faults(self, grammars: Sequence[Grammar]) -> list[str | None]:
        """Why each of some grammars cannot be compiled, or none where it can; tells in seconds.

        Raises:
            QueueFull: it could later.
        """

    @abstractmethod
    async def embed(self, tokens: list[int], adapter: str | None = None) -> list[float]:
        """The mean of the last layer's hidden states over a text's tokens, scaled to length 1.

        Raises:
            InvalidRequest, QueueFull, RequestFailed: as `generate` and its iterator.
        """

    async def score(self, tokens: list[int], adapter: str | None = None) -> list[float]:
        """The log-probability of each token but the first, given those before it; raises as `generate`."""
        id = f"score-{uuid.uuid4().hex}"
        request = GenerateRequest(id, tokens, max_tokens=0, prompt_logprobs=0, adapter=adapter)
        deltas = [delta async for delta in self.generate(request)]
        return [token.logprob for delta in deltas for token in delta.prompt if token.logprob is not None]

    @abstractmethod
    def abort(self, id: str) -> None:
        """Give up a request and free its place within one step; does nothing if it has ended."""

    @abstractmethod
    def stats(self) -> EngineStats: ...

    @abstractmethod
    def check(self) -> None:
        """Raise what ended the engine, if it has ended."""

    @abstractmethod
    def close(self) -> None:
        """End the engine; requests in flight fail."""


def validate(
    request: GenerateRequest, context: int, vocabulary: int, max_batch: int, adapters: Collection[str]
) -> None:
    """
    Raises:
        InvalidRequest: an engine with these bounds can never serve it.
    """
    if request.adapter is not None and request.adapter not in adapters:
        raise InvalidRequest(f"there is no adapter {request.adapter!r}", "model", "model_not_found")
    prompt, total = len(request.tokens), len(request.tokens) + request.max_tokens
    if not prompt:
        raise InvalidRequest("the prompt is empty, and this model has no token that a text starts with", "prompt")
    if total > context:
        raise InvalidRequest(
            f"the prompt's {prompt} tokens and max_tokens {request.max_tokens} are over the context of "
            f"{context} tokens: shorten one of them",
            "prompt" if prompt >= context else "max_tokens",
            "context_length_exceeded",
        )
    unknown = next((token for token in request.tokens if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise InvalidRequest(f"token id {unknown} is not in the model's vocabulary of {vocabulary}", "prompt")
    unknown = next((token for token, _ in request.sampling.logit_bias if not 0 <= token < vocabulary), None)
    if unknown is not None:
        message = f"logit_bias: token id {unknown} is not in the model's vocabulary of {vocabulary}"
        raise InvalidRequest(message, "logit_bias")
    if request.n > max_batch:
        raise InvalidRequest(f"n {request.n} is over the {max_batch} choices decoded at once", "n")
