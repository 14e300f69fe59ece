"""An actor of Ray Data that answers parts of a batch, by the very code that answers for the endpoint."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymodels.batch.lines import (
    Json,
    Line,
    NoRequest,
    Part,
    Work,
    answer_line,
    entry_of,
    error_line,
    lines_of,
    request_of,
)
from raymodels.config import EngineConfig
from raymodels.errors import RaymodelsError
from raymodels.niceness import give_way
from raymodels.serve.answers import Usage, answer_to, embeddings
from raymodels.serve.engine import NO_ADAPTERS, Delta
from raymodels.serve.replica import Accepted, Replica
from raymodels.serve.schema import EmbeddingRequest, Problem, Refused, Request

log = logging.getLogger(__name__)

FULL_WAIT_S = 0.05
"""How long to wait where the engine has no place left, before asking again."""
FAILED = Problem(status=500, message="the server failed", type="server_error", code="internal_error")


USAGE = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Outcome:
    """What becomes of a line: a line of the output, with what it cost, or of the error file."""

    line: bytes
    usage: Json | None = None

    @classmethod
    def of(cls, content: Json, usage: Json | None = None) -> Outcome:
        return cls(json.dumps(content, allow_nan=False).encode() + b"\n", usage)


def lines_at_once(engine: EngineConfig) -> int:
    """Lines that one actor works on: with a batch waiting behind the one that is decoded, no place stays free."""
    return min(2 * engine.max_batch, engine.max_batch + engine.max_queue)


class Answerer:
    """Loads a model, and answers the parts of an input that Ray Data gives it, several at once.

    Args:
        place: the input.
        served_as: the name that requests may call the model by; its adapters go by their own.
        unnamed: which of these names is meant by a request that has none.
        registry, reference, engine, threads, adapters: as for `Replica`.
    """

    def __init__(
        self,
        place: str,
        served_as: str,
        unnamed: str,
        registry: str,
        reference: str,
        engine: EngineConfig,
        threads: int,
        adapters: Mapping[str, str] = NO_ADAPTERS,
    ) -> None:
        give_way()  # before the engine starts threads
        self._place = place
        self._names = (served_as, *adapters)
        self._unnamed = unnamed
        self._room = asyncio.Semaphore(lines_at_once(engine))
        self._failure: RaymodelsError | None = None
        try:
            self._replica = Replica(registry, reference, engine, threads, adapters)
        except RaymodelsError as error:  # raised here, it would be tried again, and arrive wrapped in Ray's own error
            self._failure = error

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The result of one part: the bytes of a part's file, or the error that ends the batch; both pickled."""
        part: Part = pickle.loads(row["part"])
        try:
            if self._failure:
                raise self._failure
            return {"number": part.number, "result": pickle.dumps(await self._answered(part))}
        except RaymodelsError as error:
            return {"number": part.number, "result": pickle.dumps(error)}

    async def _answered(self, part: Part) -> bytes:
        """One line that counts, then those that answer, then those that tell of errors; each in the input's order."""
        lines = await asyncio.to_thread(lambda: list(lines_of(self._place, part)))
        outcomes = await asyncio.gather(*(self._outcome(line) for line in lines))
        completed = [outcome for outcome in outcomes if outcome.usage is not None]
        failed = [outcome for outcome in outcomes if outcome.usage is None]
        usage = {key: sum((each.usage or {}).get(key, 0) for each in completed) for key in USAGE}
        head = Outcome.of({"completed": len(completed), "failed": len(failed), **usage})
        return b"".join(outcome.line for outcome in [head, *completed, *failed])

    async def _outcome(self, line: Line) -> Outcome:
        try:
            entry = entry_of(line)
        except NoRequest as error:
            return Outcome.of(error_line(line.number, error))
        try:
            request = request_of(entry, self._names, self._unnamed)
            async with self._room:
                body = await self._body(request)
            return Outcome.of(answer_line(entry.custom_id, 200, body), body["usage"])
        except Refused as refused:
            problem = refused.problem
        except Exception as error:
            await self._replica.check_health()  # an engine that has failed ends the batch, not every line of it
            log.error("line %d failed", line.number, exc_info=error)
            problem = FAILED
        return Outcome.of(answer_line(entry.custom_id, problem.status, problem.body()))

    async def _body(self, request: Work) -> Json:
        """The answer to a request, as soon as the engine has room for all its choices."""
        while True:
            try:
                if isinstance(request, EmbeddingRequest):
                    return await self._embedded(request)
                return await self._generated(request)
            except Refused as refused:
                if refused.problem.status != 429:
                    raise
            await asyncio.sleep(FULL_WAIT_S)

    async def _embedded(self, request: EmbeddingRequest) -> Json:
        found = await self._replica.embed(request, self._adapter(request))
        if isinstance(found, Problem):
            raise Refused(found)
        return embeddings(request, found.vectors, found.prompt_tokens)

    async def _generated(self, request: Request) -> Json:
        usage, deltas = Usage(0), list[Delta]()
        async for item in self._replica.generate(request, adapter=self._adapter(request)):
            if isinstance(item, Problem):
                raise Refused(item)
            if isinstance(item, Accepted):
                usage = Usage(item.prompt_tokens)
            else:
                for delta in item:
                    usage.add(delta)
                deltas += item
        return answer_to(request).whole(deltas, usage)

    def _adapter(self, request: Work) -> str | None:
        """The adapter that a request is for; none if it is for the model itself."""
        return request.model if request.model != self._names[0] else None
