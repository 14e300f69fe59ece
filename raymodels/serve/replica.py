"""One replica of one model version, as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from ray import serve

from raymodels.config import EngineConfig
from raymodels.registry import Registry, Version
from raymodels.serve.engine import Delta, Engine, GenerateRequest, InvalidRequest, QueueFull, Sampling
from raymodels.serve.schema import ChatRequest, CompletionRequest, Problem, Refused, Request, overloaded
from raymodels.serve.transformers_engine import TransformersEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """The first item of an answer: the request is queued. ``prompt_tokens`` is the sum over all prompts."""

    prompt_tokens: int


@dataclass(frozen=True)
class Description:
    """What a replica serves."""

    reference: str
    context: int
    has_chat_template: bool
    published_unix_seconds: int


Item = Accepted | Problem | list[Delta]


class Replica:
    """Loads a version, after its checksums are verified, and answers for it.

    Args:
        registry: where the version is.
        reference: NAME@3, resolved, so that every replica of a deployment serves the same.
        threads: CPU threads of the engine.

    Raises:
        IntegrityError: a file differs from its recorded checksum; names it.
        RegistryError: there is no such version.
        ServeError: the model cannot be served.
    """

    def __init__(self, registry: str, reference: str, engine: EngineConfig, threads: int) -> None:
        self._version: Version = Registry(registry).resolve(reference)
        self._engine: Engine = TransformersEngine(self._version.fetch(), engine, threads)
        self._max_prompts = engine.max_batch + engine.max_queue

    async def generate(self, request: Request) -> AsyncIterator[Item]:
        """Answer one request: `Accepted` and then lists of deltas, or a single `Problem`.

        Deltas of several prompts are numbered through: choice ``c`` of prompt ``p`` is ``p * n + c``. Closing the
        iterator frees all that the request holds.
        """
        try:
            parts = self._parts(request)
        except Refused as refused:
            yield refused.problem
            return
        try:
            try:
                streams = [self._engine.generate(part) for part in parts]
            except (InvalidRequest, QueueFull) as error:
                yield _problem(error, request)
                return
            yield Accepted(sum(len(part.tokens) for part in parts))
            if echoed := self._echo(request, parts):
                yield echoed
            offsets = [len(delta.text) for delta in echoed] or [0] * request.n * len(parts)
            async for deltas in _merged(streams):
                yield [_shifted(replace(delta, choice=p * request.n + delta.choice), offsets) for p, delta in deltas]
        finally:
            for part in parts:
                self._engine.abort(part.id)

    async def describe(self) -> Description:
        published = int(self._version.card.get("published_unix_seconds", 0))
        text, context = self._engine.text, self._engine.context
        return Description(self._version.reference, context, text.has_chat_template, published)

    async def stats(self) -> Any:
        """The engine's `EngineStats`."""
        return self._engine.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica when this raises."""
        self._engine.check()

    def _parts(self, request: Request) -> list[GenerateRequest]:
        """One engine request per prompt."""
        prompts = self._prompts(request)
        if len(prompts) * request.n > self._max_prompts:
            message = f"{len(prompts)} prompts with n {request.n} are over the {self._max_prompts} choices held at once"
            raise Refused(Problem(status=400, message=f"{message}: send fewer", param="prompt"))
        return [self._part(request, tokens) for tokens in prompts]

    def _part(self, request: Request, tokens: list[int]) -> GenerateRequest:
        room = self._engine.context - len(tokens)
        if isinstance(request, ChatRequest):
            max_tokens = request.max_completion_tokens or request.max_tokens or max(1, room)
            logprobs, prompt_logprobs = (request.top_logprobs if request.logprobs else None), None
        else:
            max_tokens = request.max_tokens if request.max_tokens is not None else max(1, min(16, room))
            logprobs, prompt_logprobs = request.logprobs, request.logprobs if request.echo else None
        return GenerateRequest(
            id=uuid.uuid4().hex,
            tokens=tokens,
            max_tokens=max_tokens,
            n=request.n,
            sampling=Sampling(request.temperature, request.top_p, max(0, request.top_k), request.seed),
            stop=request.stops,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _prompts(self, request: Request) -> list[list[int]]:
        text, field = self._engine.text, "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, CompletionRequest):
                prompts = [text.encode(p) if isinstance(p, str) else p for p in request.prompts]
            elif text.has_chat_template:
                prompts = [text.encode_chat([message.plain() for message in request.messages])]
            else:
                name = self._version.reference
                raise Refused(Problem(status=400, message=f"{name} has no chat template: use /v1/completions"))
        except UnicodeEncodeError as error:
            raise _unusable(f"{field} holds a lone surrogate, which is no character: {error.reason}", field) from error
        except TemplateError as error:
            raise _unusable(f"the model's chat template refuses this conversation: {error}", field) from error
        start = [] if text.start is None else [text.start]
        return [prompt or start for prompt in prompts]

    def _echo(self, request: Request, parts: list[GenerateRequest]) -> list[Delta]:
        """The prompts themselves, as the beginning of every choice's text."""
        if isinstance(request, ChatRequest) or not request.echo:
            return []
        texts = [p if isinstance(p, str) else self._engine.text.decode(p) for p in request.prompts]
        return [
            Delta(choice=position * request.n + choice, text=text, generated=0)
            for position, text in enumerate(texts)
            for choice in range(request.n)
        ]


def _unusable(message: str, field: str) -> Refused:
    return Refused(Problem(status=400, message=message, param=field))


def _problem(error: InvalidRequest | QueueFull, request: Request) -> Problem:
    if isinstance(error, QueueFull):
        return overloaded(str(error))
    field = "messages" if error.field == "prompt" and isinstance(request, ChatRequest) else error.field
    return Problem(status=400, message=str(error), param=field, code=error.code)


def _shifted(delta: Delta, offsets: list[int]) -> Delta:
    """The delta with its new tokens' offsets counted from the beginning of the echoed prompt."""
    offset = offsets[delta.choice]
    if not offset or not delta.tokens:
        return delta
    return replace(delta, tokens=tuple(replace(token, offset=token.offset + offset) for token in delta.tokens))


async def _merged(streams: list[AsyncIterator[Delta]]) -> AsyncIterator[list[tuple[int, Delta]]]:
    """Deltas of several streams with their stream's number, as they come; all that are there at once together."""
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
        open_streams = len(tasks)
        while open_streams:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            deltas = []
            for number, item in items:
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    deltas.append((number, item))
            if deltas:
                yield deltas
    finally:
        for task in tasks:
            task.cancel()


ModelDeployment = serve.deployment(Replica)
