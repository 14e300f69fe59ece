"""One replica of one model version, as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ray import serve
from transformers import AutoConfig

from raymodels import niceness
from raymodels.config import EngineConfig
from raymodels.registry import Registry, Version
from raymodels.serve.adapter_sources import fetched
from raymodels.serve.answers import joined
from raymodels.serve.encoding import Answered, Encoder
from raymodels.serve.enforcement import enforced
from raymodels.serve.engine import (
    NO_ADAPTERS,
    Delta,
    Engine,
    EngineStats,
    Grammar,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    validate,
)
from raymodels.serve.engines import open_engine
from raymodels.serve.load import LoadMeter
from raymodels.serve.pace import Pace
from raymodels.serve.portions import portions
from raymodels.serve.schema import (
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Problem,
    Refused,
    Request,
    TokenizeChatRequest,
    TokenizeRequest,
    overloaded,
    refused,
)
from raymodels.serve.translate import Translator
from raymodels.serve.wire import Wire

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Accepted:
    """The first item of an answer: the request is queued. ``prompt_tokens`` is the sum over all prompts.

    ``ignored`` names fields that the answer does not follow.
    """

    prompt_tokens: int
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a replica serves."""

    reference: str
    context: int
    has_chat_template: bool
    published_unix_seconds: int
    vocabulary: int
    choices: int
    """Most choices of one request."""
    dimensions: int
    """Of an embedding."""


@dataclass(frozen=True)
class Embedded:
    """One vector per text, and the tokens of all texts."""

    vectors: list[list[float]]
    prompt_tokens: int


@dataclass(frozen=True)
class Waiting:
    """What waits at the gateways, where the autoscaler cannot see it."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class Process:
    """The process that a replica or a gateway runs in, how many tasks its event loop has, and its niceness."""

    pid: int
    tasks: int
    niceness: int


NOBODY = Waiting(0, 0)
Item = Accepted | Problem | list[Delta]


class Replica:
    """Loads a version, after its checksums are verified, and answers for it.

    Args:
        registry: where the version is.
        reference: NAME@3, resolved, so that every replica of a deployment serves the same.
        threads: CPU threads of the engine.
        adapters: name -> resolved source.

    Raises:
        AdapterError: an adapter cannot be used with the model; says why.
        IntegrityError: a file differs from its recorded checksum; names it.
        RegistryError: there is no such version.
        ServeError: the model cannot be served.
    """

    def __init__(
        self,
        registry: str,
        reference: str,
        engine: EngineConfig,
        threads: int,
        adapters: Mapping[str, str] = NO_ADAPTERS,
    ) -> None:
        if niceness.current() > niceness.SERVER:
            log.warning("this replica gives way to others on its machine: %s", niceness.REMEDY)
        self._version: Version = Registry(registry).resolve(reference)
        folder = self._version.fetch()
        folders = {name: fetched(source, Registry(registry)) for name, source in adapters.items()}
        self._engine: Engine = open_engine(folder, engine, threads, folders)
        self._dimensions = int(AutoConfig.from_pretrained(folder, trust_remote_code=False).hidden_size)
        self._choices = engine.max_batch
        self._load = LoadMeter()
        self._pace = Pace()
        text, context, held = self._engine.text, self._engine.context, engine.max_batch + engine.max_queue
        self._translator = Translator(text, Encoder(text, context, held), self._version.reference, context, held)

    async def generate(
        self, request: Request, waiting: Waiting = NOBODY, adapter: str | None = None
    ) -> AsyncIterator[Item]:
        """Answer one request: `Accepted` and then lists of deltas, or a `Problem`, which ends it wherever it comes.

        Deltas of several prompts are numbered through: choice ``c`` of prompt ``p`` is ``p * n + c``. Closing the
        iterator frees all that the request holds.
        """
        self._load.held(waiting.sequences, waiting.tokens)
        try:
            parts = await self._translator.parts(request, adapter)
        except (Refused, QueueFull) as error:
            yield error.problem if isinstance(error, Refused) else _problem(error, request)
            return
        choices, began, accepted = request.n * len(parts), time.monotonic(), False
        self._load.arrived(choices)
        try:
            try:
                grammar, ignored = await self._grammar(request)
                streams = [self._engine.generate(replace(part, grammar=grammar)) for part in parts]
            except (InvalidRequest, QueueFull) as error:
                yield _problem(error, request)
                return
            accepted = True
            yield Accepted(sum(len(part.tokens) for part in parts), ignored)
            if echoed := self._echo(request):
                yield echoed
            offsets = [len(delta.text) for delta in echoed] or [0] * request.n * len(parts)
            with self._pace.answer(request.stream) as gap_s:
                async for deltas in _merged(streams, gap_s):
                    if began:
                        self._load.first_token(time.monotonic() - began)
                        began = 0.0
                    placed = [replace(delta, choice=p * request.n + delta.choice) for p, delta in deltas]
                    shown = placed if request.stream else joined(placed)
                    for portion in portions([_shifted(delta, offsets) for delta in shown]):
                        yield portion
        except (InvalidRequest, RequestFailed) as error:  # a grammar that could not be followed to its end, say
            yield _problem(error, request)
        finally:
            if accepted:
                self._load.left(choices)
            for part in parts:
                self._engine.abort(part.id)

    async def check(self, request: Request | EmbeddingRequest, adapter: str | None = None) -> int | Problem:
        """The prompt tokens of a request that is to be answered in parts, or why it cannot be, whichever part it is."""
        try:
            if isinstance(request, EmbeddingRequest):
                return sum(map(len, await self._translator.inputs(request)))
            parts = await self._translator.parts(request, adapter)
            for part in parts:
                validate(part, self._engine.context, self._engine.vocabulary, self._choices, [adapter or ""])
        except Refused as error:
            return error.problem
        except (InvalidRequest, QueueFull) as error:
            return _problem(error, request)
        return sum(len(part.tokens) for part in parts)

    async def embed(self, request: EmbeddingRequest, adapter: str | None = None) -> Embedded | Problem:
        """The vectors of one or several texts."""
        try:
            if request.dimensions not in (None, self._dimensions):
                raise refused(f"dimensions: this model has {self._dimensions} and no other", "dimensions")
            inputs = await self._translator.inputs(request)
            vectors = await asyncio.gather(*(self._engine.embed(tokens, adapter) for tokens in inputs))
        except Refused as error:
            return error.problem
        except (InvalidRequest, QueueFull, RequestFailed) as error:
            return _problem(error, request)
        return Embedded(vectors, sum(len(tokens) for tokens in inputs))

    async def tokenize(self, request: TokenizeRequest | TokenizeChatRequest) -> Answered | Problem:
        """The answer to ``POST /tokenize``."""
        return await _answered(self._translator.tokenized(request))

    async def detokenize(self, request: DetokenizeRequest) -> Answered | Problem:
        """The answer to ``POST /detokenize``."""
        return await _answered(self._translator.detokenized(request.tokens))

    async def tokenizer_info(self) -> dict[str, Any]:
        """The answer to ``GET /tokenizer_info``, but the model's name."""
        text = self._engine.text
        return text.describe() | {"max_model_len": self._engine.context, "chat_template": text.chat_template}

    async def describe(self) -> Description:
        published = int(self._version.card.get("published_unix_seconds", 0))
        text = self._engine.text
        return Description(
            reference=self._version.reference,
            context=self._engine.context,
            has_chat_template=text.has_chat_template,
            published_unix_seconds=published,
            vocabulary=min(text.size, self._engine.vocabulary),
            choices=self._choices,
            dimensions=self._dimensions,
        )

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def process(self) -> Process:
        return this_process()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve about once a second; what `scaling.ServePolicy` decides by."""
        return self._load.report(self._engine.stats())

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica when this raises."""
        self._engine.check()

    async def _grammar(self, request: Request) -> tuple[Grammar | None, tuple[str, ...]]:
        """What each choice's text must match, and the fields that it leaves out; raises as `enforced`."""
        if not isinstance(request, ChatRequest):
            return None, ()
        return await enforced(request, self._translator.tagged, self._engine)

    def _echo(self, request: Request) -> list[Delta]:
        """The prompts themselves, as the beginning of every choice's text."""
        if isinstance(request, ChatRequest) or not request.echo:
            return []
        return [
            Delta(choice=position * request.n + choice, text=text, generated=0)
            for position, text in enumerate(self._translator.echoed(request))
            for choice in range(request.n)
        ]


async def _answered(answer: Awaitable[Answered]) -> Answered | Problem:
    try:
        return await answer
    except Refused as error:
        return error.problem
    except QueueFull as error:
        return overloaded(str(error))


def this_process() -> Process:
    return Process(os.getpid(), len(asyncio.all_tasks()), niceness.current())


def _problem(error: InvalidRequest | QueueFull | RequestFailed, request: Wire) -> Problem:
    if isinstance(error, QueueFull):
        return overloaded(str(error))
    if isinstance(error, RequestFailed):
        return Problem(status=500, message=str(error), type="server_error", code="request_failed")
    field = error.field
    if field == "prompt":
        field = {ChatRequest: "messages", EmbeddingRequest: "input"}.get(type(request), field)
    elif field == "grammar" and isinstance(request, ChatRequest):
        field = "response_format" if request.json_schema is not None and not request.callable_tools else "tools"
    status = 404 if error.code == "model_not_found" else 400
    return Problem(status=status, message=str(error), param=field, code=error.code)


def _shifted(delta: Delta, offsets: list[int]) -> Delta:
    """The delta with its new tokens' offsets counted from the beginning of the echoed prompt."""
    offset = offsets[delta.choice]
    if not offset or not delta.tokens:
        return delta
    return replace(delta, tokens=tuple(replace(token, offset=token.offset + offset) for token in delta.tokens))


async def _merged(
    streams: list[AsyncIterator[Delta]], gap_s: Callable[[], float]
) -> AsyncIterator[list[tuple[int, Delta]]]:
    """Deltas of several streams with their stream's number: the first ones at once, then what came in ``gap_s``.

    A piece leaves with the first delta after that, which comes when a step of the engine ends: so the pieces of all
    answers leave together, which costs less than one by one. It waits no longer for it than ``gap_s`` again.
    """
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async for delta in stream:
                queue.put_nowait((number, delta))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(forward(number, stream)) for number, stream in enumerate(streams)]
    try:
        open_streams, sent = len(tasks), -math.inf
        while open_streams:
            items = [await queue.get()]
            if (rest := sent + gap_s() - time.monotonic()) > 0:
                await asyncio.wait(tasks, timeout=None if rest == math.inf else rest)  # what has ended waits no longer
                items += _taken(queue)
                if all(isinstance(item, Delta) for _, item in items):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(gap_s()):
                            items.append(await queue.get())
            items += _taken(queue)
            deltas = []
            for number, item in items:
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    deltas.append((number, item))
            if deltas:
                sent = time.monotonic()
                yield deltas
    finally:
        for task in tasks:
            task.cancel()


def _taken(queue: asyncio.Queue[T]) -> list[T]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


ModelDeployment = serve.deployment(Replica)
