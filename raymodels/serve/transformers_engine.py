"""The default engine: continuous batching over transformers' modules, in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.batch import Batch, Gain
from raymodels.serve.engine import (
    NO_ADAPTERS,
    Delta,
    Engine,
    EngineStats,
    GenerateRequest,
    Grammar,
    RequestFailed,
    validate,
)
from raymodels.serve.grammar import Grammars
from raymodels.serve.listeners import Listeners
from raymodels.serve.packed_model import PackedModel
from raymodels.serve.text import Text

log = logging.getLogger(__name__)

NICENESS = 4
"""Added where the cores compute the model, which leaves them no pause: else every token waits to be sent for a slice of
theirs, some milliseconds at each hop.
"""

TRIAL = GenerateRequest("the engine's own trial", [0], max_tokens=1, priority=2**31)
"""What the engine asks of itself when a request has failed: token 0 was among those that it was proven with."""


class TransformersEngine(Engine):
    """Serves a directory in Hugging Face layout. On return it is warm, and proven against the model's own forward.

    Args:
        threads: CPU threads that the engine computes with.
        adapters: name -> folder in PEFT's format.

    Raises:
        ServeError: the directory cannot be served; says why.
    """

    def __init__(
        self, model_dir: str, config: EngineConfig, threads: int = 1, adapters: Mapping[str, str] = NO_ADAPTERS
    ) -> None:
        self._max_batch, self._threads, self._adapters = config.max_batch, threads, frozenset(adapters)
        self._listeners = Listeners(config.max_batch + config.max_queue, self.abort)
        # In the order in which they came: an id is aborted after it was added, and may be used again after that.
        self._commands: deque[GenerateRequest | str] = deque()
        self._trying = False
        self._wake = threading.Condition()
        self._closing = False
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model_dir, config, adapters, ready), name="engine", daemon=True
        )
        self._thread.start()
        ready.result()

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See `Engine.generate`."""
        validate(request, self.context, self.vocabulary, self._max_batch, self._adapters)
        if request.grammar:
            request = replace(request, grammar=self._grammars.compile_now(request.grammar))
        with self._wake:
            deltas = self._listeners.add(request)
            self._commands.append(request)
            self._wake.notify()
        return deltas

    async def compile(self, grammar: Grammar) -> Grammar:
        """See `Engine.compile`."""
        return await self._grammars.compile(grammar)

    async def faults(self, grammars: Sequence[Grammar]) -> list[str | None]:
        """See `Engine.faults`."""
        return await self._grammars.faults(grammars)

    async def embed(self, tokens: list[int], adapter: str | None = None) -> list[float]:
        """See `Engine.embed`."""
        request = GenerateRequest(f"embed-{uuid.uuid4().hex}", tokens, max_tokens=0, embed=True, adapter=adapter)
        deltas = [delta async for delta in self.generate(request)]
        return list(deltas[-1].embedding)

    def abort(self, id: str) -> None:
        """See `Engine.abort`."""
        with self._wake:
            if self._listeners.remove(id):
                self._commands.append(id)
                self._wake.notify()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        batch, cache = self._batch, self._model.cache
        running = len(batch.active)
        return EngineStats(
            running=running,
            queued=max(0, self._listeners.choices - running),
            tokens_in=batch.tokens_in,
            tokens_out=batch.tokens_out,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            parkings=batch.parkings,
            kv_usage=cache.used / cache.capacity,
        )

    def check(self) -> None:
        """See `Engine.check`."""
        self._listeners.check()

    def close(self) -> None:
        """See `Engine.close`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._grammars.close()

    def _run(self, model_dir: str, config: EngineConfig, adapters: Mapping[str, str], ready: Future[None]) -> None:
        try:
            self._load(model_dir, config, adapters)
            ready.set_result(None)
            while self._take():
                gains = self._batch.step()
                self._listeners.put(gains)
                self._try(gains)
            self._listeners.fail(ServeError("the engine is closed"))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
                return
            log.critical("the engine has failed", exc_info=error)
            failure = ServeError(f"the engine has failed: {error}")
            failure.__cause__ = error
            self._listeners.fail(failure)

    def _load(self, model_dir: str, config: EngineConfig, adapters: Mapping[str, str]) -> None:
        # In the thread that computes, so that no other thread has OpenMP workers: with more of them than cores, libgomp
        # no longer lets them spin, and each of the hundreds of products of a step waits for one to be woken.
        if not torch.cuda.is_available():
            os.nice(NICENESS)  # of this thread and its workers
        torch.set_num_threads(self._threads)
        self._model = PackedModel(model_dir, config, adapters)
        self._model.prove()
        self.context, self.vocabulary = self._model.context, self._model.vocabulary
        self.text = Text.of(model_dir)
        self._grammars = Grammars(self.text, self._model.vocabulary)
        self._batch = Batch(self._model, self.text, self._grammars, config)

    def _take(self) -> bool:
        """Wait for work and take in what was asked since the last step; false once closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or self._batch.busy or self._closing)
            commands, self._commands = self._commands, deque()
        for command in commands:
            if isinstance(command, str):
                self._batch.abort(command)
            else:
                self._batch.add([command])
        return not self._closing

    def _try(self, gains: list[Gain]) -> None:
        """After a request has failed, compute one token for nobody: where that fails too, so has the engine."""
        for id, item in gains:
            if id == TRIAL.id:
                self._trying = False
                if isinstance(item, Exception):
                    raise item
            elif isinstance(item, RequestFailed) and not self._trying:
                self._trying = True
                self._batch.add([TRIAL])
