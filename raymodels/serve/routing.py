"""Which application serves which model name, and calls to it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException

from raymodels.serve.answers import Usage
from raymodels.serve.engine import Delta
from raymodels.serve.replica import NOBODY, Accepted, Description, Waiting
from raymodels.serve.schema import RETRY_AFTER_S, Problem, Refused, Request, overloaded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """Where a model name leads: application -> its share of requests, and one that sees a copy of them."""

    applications: dict[str, float]
    shadow: str | None = None

    def choose(self) -> str:
        names, weights = zip(*self.applications.items(), strict=True)
        return str(random.choices(names, weights)[0])


@dataclass
class Routes:
    """The routing table, and handles to the applications in it.

    Args:
        table: model name -> route.
        bound: handles of models that are deployed in the gateway's own application.
    """

    table: dict[str, Route]
    bound: dict[str, Any] = field(default_factory=dict)

    async def describe(self, model: str) -> Description:
        """What serves a model name.

        Raises:
            Refused: 404 for an unknown name, 503 where nothing answers.
        """
        handle = await self._handle(self._route(model).choose())
        try:
            about: Description = await handle.describe.remote()
        except Exception as error:
            raise _failed(error) from error
        return about

    async def call(self, request: Request, deadline: float, waiting: Waiting = NOBODY) -> Call:
        """Send a request to a replica of its model; returns once the replica has taken it.

        Args:
            deadline: when to give up, in the event loop's time.
            waiting: what else waits for the model, for the autoscaler.

        Raises:
            Refused: by the table, by the replica, or because none answers.
        """
        handle = await self._handle(self._route(request.model).choose())
        call = Call(handle.options(stream=True).generate.remote(request, waiting), deadline)
        try:
            await call.accept()
        except BaseException:
            call.cancel()
            raise
        return call

    async def ask(self, model: str, method: str, *args: Any, deadline: float) -> Any:
        """Call a method of a replica that answers once; raises as `call`."""
        handle = await self._handle(self._route(model).choose())
        response = getattr(handle, method).remote(*args)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await response
        except TimeoutError as error:
            response.cancel()
            raise _late() from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise _failed(error) from error
        if isinstance(answer, Problem):
            raise Refused(answer)
        return answer

    def only(self) -> str:
        """The name of the one model there is.

        Raises:
            Refused: 400 if there are several.
        """
        if len(self.table) != 1:
            message = f"model is missing; models: {', '.join(sorted(self.table))}"
            raise Refused(Problem(status=400, message=message, param="model"))
        return next(iter(self.table))

    async def unready(self) -> list[str]:
        """Model names without a running replica."""
        status = await asyncio.to_thread(serve.status)
        running = set()
        for name, application in status.applications.items():
            for deployment, state in application.deployments.items():
                if state.replica_states.get("RUNNING", 0) > 0:
                    running |= {name, deployment}
        return sorted(model for model, route in self.table.items() if not running & route.applications.keys())

    def check(self, model: str) -> None:
        """Raises `Refused`, 404, if there is no such model."""
        self._route(model)

    def _route(self, model: str) -> Route:
        if model not in self.table:
            known = ", ".join(sorted(self.table))
            message = f"there is no model {model!r} here; models: {known}"
            raise Refused(Problem(status=404, message=message, param="model", code="model_not_found"))
        return self.table[model]

    async def _handle(self, application: str) -> Any:
        if application not in self.bound:
            try:
                self.bound[application] = await asyncio.to_thread(serve.get_app_handle, application)
            except RayServeException as error:
                raise _failed(error) from error
        return self.bound[application]


class Call:
    """A request in a replica's hands: its deltas, and what they cost so far."""

    def __init__(self, items: Any, deadline: float) -> None:
        self._items = items
        self._deadline = deadline
        self._open = True
        self.usage = Usage(0)

    async def accept(self) -> None:
        """Wait until the replica has taken the request or refused it."""
        first = await self._next()
        if isinstance(first, Problem):
            raise Refused(first)
        assert isinstance(first, Accepted)
        self.usage = Usage(first.prompt_tokens)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Deltas as they come. Closing the iterator gives the request up.

        Raises:
            Refused: the replica failed, or the deadline has passed.
        """
        try:
            while (deltas := await self._next()) is not None:
                for delta in deltas:
                    self.usage.add(delta)
                yield deltas
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give the request up, unless it has ended: Ray would raise again what ended it."""
        if self._open:
            self._open = False
            self._items.cancel()

    async def _next(self) -> Any:
        try:
            async with asyncio.timeout_at(self._deadline):
                item = await anext(self._items, None)
            self._open = item is not None
            return item
        except TimeoutError as error:
            self.cancel()
            raise _late() from error
        except Exception as error:
            self._open = False
            raise _failed(error) from error


def _late() -> Refused:
    message = "the request took longer than this server allows"
    return Refused(Problem(status=504, message=message, type="server_error", code="timeout"))


def _failed(error: Exception) -> Refused:
    """Why a replica did not answer. The cause goes to the log: it may hold what is not for clients."""
    if isinstance(error, BackPressureError):
        return Refused(overloaded("the server is at its limit: try again later"))
    log.error("a replica failed", exc_info=error)
    if isinstance(error, RayServeException):
        message = "no replica of this model is running: try again later"
        return Refused(
            Problem(status=503, message=message, type="server_error", code="unavailable", retry_after_s=RETRY_AFTER_S)
        )
    return Refused(
        Problem(status=500, message="the model's replica failed", type="server_error", code="replica_failed")
    )
