"""The default engine: continuous batching over transformers' modules, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve import weights
from raymodels.serve.batch import Batch, Gain
from raymodels.serve.engine import Delta, EngineStats, GenerateRequest, QueueFull, validate
from raymodels.serve.grammar import Grammars
from raymodels.serve.kv_cache import ATTENTION, KVCache, Segment, packed_attention
from raymodels.serve.prefix import PrefixCache
from raymodels.serve.text import Text

log = logging.getLogger(__name__)
AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True)
class _Listener:
    """Where a request's deltas go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | Exception]
    choices: int


class TransformersEngine:
    """Serves a directory in Hugging Face layout. On return it is warm, and proven against the model's own forward.

    Args:
        threads: CPU threads that the engine computes with.

    Raises:
        ServeError: the directory cannot be served; says why.
    """

    def __init__(self, model_dir: str, config: EngineConfig, threads: int = 1) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(model_dir, config.dtype, device)
        self.text = Text(AutoTokenizer.from_pretrained(model_dir))
        weights.prepare(self._model, config.quantization)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._config = config
        self._threads = threads
        memory = config.kv_memory or _spare_memory(device)
        prefix_memory = memory * config.prefix_cache
        self._cache = KVCache(_kv_shape(self._model.config), self._model.dtype, device, memory - prefix_memory)
        self.context = _context(self._model.config, config.max_context, self._cache.longest)
        prefixes = PrefixCache(self._cache, int(prefix_memory // self._cache.position_bytes))
        ends = _ends(self._model, self.text)
        self._grammars = Grammars(self.text, self._vocabulary, ends)
        self._batch = Batch(
            self._model,
            self._cache,
            prefixes,
            self.text,
            self._grammars,
            ends,
            config.max_batch,
            config.prefill_chunk,
        )
        self._listeners: dict[str, _Listener] = {}
        self._added: list[GenerateRequest] = []
        self._aborted: list[str] = []
        self._wake = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.result()

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See `Engine.generate`."""
        validate(request, self.context, self._vocabulary, self._config.max_batch)
        if request.grammar:
            self._grammars.check(request.grammar)
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue(), request.n)
        with self._wake:
            self.check()
            in_flight = sum(each.choices for each in self._listeners.values())
            if in_flight + request.n > self._config.max_batch + self._config.max_queue:
                raise QueueFull(f"{in_flight} choices are running or queued, and no more may be: try again later")
            assert request.id not in self._listeners
            self._listeners[request.id] = listener
            self._added.append(request)
            self._wake.notify()
        return self._deltas(request.id, listener)

    async def embed(self, tokens: list[int]) -> list[float]:
        """See `Engine.embed`."""
        request = GenerateRequest(f"embed-{uuid.uuid4().hex}", tokens, max_tokens=0, embed=True)
        deltas = [delta async for delta in self.generate(request)]
        return list(deltas[-1].embedding)

    async def score(self, tokens: list[int]) -> list[float]:
        """See `Engine.score`."""
        request = GenerateRequest(f"score-{uuid.uuid4().hex}", tokens, max_tokens=0, prompt_logprobs=0)
        deltas = [delta async for delta in self.generate(request)]
        return [token.logprob for delta in deltas for token in delta.prompt if token.logprob is not None]

    def abort(self, id: str) -> None:
        """See `Engine.abort`."""
        with self._wake:
            if self._listeners.pop(id, None) is not None:
                self._aborted.append(id)
                self._wake.notify()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        running, batch = len(self._batch.active), self._batch
        with self._wake:
            in_flight = sum(each.choices for each in self._listeners.values())
        return EngineStats(
            running=running,
            queued=max(0, in_flight - running),
            tokens_in=batch.tokens_in,
            tokens_out=batch.tokens_out,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            parkings=batch.parkings,
            kv_usage=self._cache.used / self._cache.capacity,
        )

    def check(self) -> None:
        """See `Engine.check`."""
        if self._failure is not None:
            raise ServeError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise ServeError("the engine is closed")

    def close(self) -> None:
        """See `Engine.close`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

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

    def _run(self, ready: Future[None]) -> None:
        try:
            torch.set_num_threads(self._threads)
            self._prove()
            ready.set_result(None)
            while self._take():
                self._send(self._batch.step())
            self._fail(ServeError("the engine was closed"))
        except BaseException as error:
            self._failure = error
            if ready.done():
                log.critical("the engine has failed", exc_info=error)
                self._fail(ServeError(f"the engine has failed: {error}"))
            else:
                ready.set_exception(error)

    def _take(self) -> bool:
        """Wait for work and take in what was asked since the last step; false once closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._added or self._aborted or self._batch.busy or self._closing)
            added, self._added = self._added, []
            aborted, self._aborted = self._aborted, []
        for id in aborted:  # before what was added: an id may be used again once its request has ended
            self._batch.abort(id)
        self._batch.add(added)
        return not self._closing

    def _send(self, gains: list[Gain]) -> None:
        """Hand a step's deltas over, one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Delta | Exception], Delta | Exception]]] = {}
        for id, gain in gains:
            if listener := self._listeners.get(id):
                by_loop.setdefault(listener.loop, []).append((listener.queue, gain))
        for loop, items in by_loop.items():
            _call(loop, items)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            listeners = list(self._listeners.values())
        for listener in listeners:
            _call(listener.loop, [(listener.queue, error)])

    @torch.inference_mode()
    def _prove(self) -> None:
        """Compare logits over the cache with the model's own: an architecture that this cannot batch is refused."""
        count = min(8, self.context)
        tokens = torch.arange(count, device=self._cache.device)[None] % self._vocabulary
        self._model.set_attn_implementation("sdpa")
        expected = self._model(input_ids=tokens, use_cache=False).logits[0].float()
        self._model.set_attn_implementation(ATTENTION)
        rows, row = [], self._cache.row(count)
        assert row is not None
        for position, part in enumerate([tokens[:, : count // 2], *tokens[:, count // 2 :].split(1, dim=1)]):
            start = 0 if position == 0 else count // 2 + position - 1
            plan = self._cache.plan([Segment(row, start, part.shape[1])])
            rows.append(self._model(input_ids=part, position_ids=plan, use_cache=False, kv_cache=self._cache).logits[0])
        self._cache.free(row)
        found = torch.cat(rows).float()
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not error < (1e-3 if self._model.dtype == torch.float32 else 5e-2):
            name = type(self._model).__name__
            raise ServeError(f"{name} cannot be batched by this engine: its logits differ by {error:.1e} of their size")


def _call(loop: asyncio.AbstractEventLoop, items: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    try:
        loop.call_soon_threadsafe(_put, items)
    except RuntimeError:
        if not loop.is_closed():  # a caller that has gone with its loop is no failure of the engine
            raise


def _put(items: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)


def _load(model_dir: str, dtype: str, device: torch.device) -> Any:
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # half precision is emulated, slowly, on most CPUs
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ServeError(f"cannot load a causal language model from {model_dir}: {error}") from error
    return model.to(device).eval()


def _kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _spare_memory(device: torch.device) -> float:
    """What keys and values may take where ``engine.kv_memory`` is not set, once the weights are loaded."""
    if device.type == "cuda":
        return 0.8 * float(torch.cuda.mem_get_info(device)[0])
    return min(4e9, 0.25 * float(psutil.virtual_memory().available))


def _context(config: Any, limit: int | None, fits: int) -> int:
    positions = int(config.max_position_embeddings)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        positions = min(positions, int(window))  # within the window, every token sees all before it
    if limit is not None and limit > positions:
        raise ServeError(f"engine.max_context {limit} is over the model's {positions} positions: lower it")
    if not fits:
        raise ServeError("engine.kv_memory does not hold a single sequence: raise it")
    if limit is not None and limit > fits:
        raise ServeError(f"engine.max_context {limit} is over the {fits} tokens that engine.kv_memory holds: raise it")
    if limit is None and positions > fits:
        log.warning("the context is cut from %d to the %d tokens that engine.kv_memory holds", positions, fits)
    return limit or min(positions, fits)


def _ends(model: Any, text: Text) -> frozenset[int]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        return frozenset() if text.end is None else frozenset([text.end])
    return frozenset([configured] if isinstance(configured, int) else configured)
