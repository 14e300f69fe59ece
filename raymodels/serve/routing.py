"""Which application serves which model name, and calls to it."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import grpc
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

from raymodels.cluster import alive_nodes
from raymodels.serve.answers import Usage
from raymodels.serve.engine import Delta
from raymodels.serve.replica import NOBODY, Accepted, Description, Waiting
from raymodels.serve.schema import RETRY_AFTER_S, Problem, Refused, Request, overloaded

log = logging.getLogger(__name__)

RETRIES = 3
"""How often a request is sent again whose replica died. A request that ends its replicas cannot end many."""
WATCH_S = 2.0
UNTAKEN_S, AFTERMATH_S = 5.0, 10.0
"""What no replica has taken for so long is taken back, in so long after the death of a node."""


@dataclass(frozen=True)
class Route:
    """Where a model name leads: application -> its share of requests, and one that sees a copy of them.

    An adapter's name has that of its base as ``parent``, and leads to the base's applications.
    """

    applications: dict[str, float]
    shadow: str | None = None
    parent: str | None = None

    def choose(self) -> str:
        names, weights = zip(*self.applications.items(), strict=True)
        return str(random.choices(names, weights)[0])


@dataclass(frozen=True)
class Target:
    """Where one request goes: chosen once, so that all that belongs to it is answered by one version."""

    application: str
    adapter: str | None


@dataclass
class Routes:
    """The routing table, and handles to the applications in it.

    Args:
        table: model name -> route.
        bound: handles of models that are deployed in the gateway's own application.
        wait_s: how long a request waits for a replica to take it.
    """

    table: dict[str, Route]
    bound: dict[str, Any] = field(default_factory=dict)
    wait_s: float = math.inf
    _found: dict[str, Any] = field(default_factory=dict, init=False)
    """Handles of applications of their own."""
    _sent: WeakKeyDictionary[Any, float] = field(default_factory=WeakKeyDictionary, init=False)  # and when

    def replace(self, table: Mapping[str, Route]) -> None:
        """Take over another table. What was sent by the one before goes on."""
        self.table.clear()
        self.table |= table
        wanted = {application for route in self.table.values() for application in route.applications}
        self._found = {name: handle for name, handle in self._found.items() if name in wanted}

    def target(self, model: str) -> Target:
        """Where a request for a model goes now; raises `Refused`, 404, if there is no such model."""
        route = self._route(model)
        return Target(route.choose(), model if route.parent else None)

    async def watch(self) -> None:
        """After the death of a node, send again what no replica has taken, until cancelled.

        A node that is cut off closes no connection. Calls that its replicas had taken are given up by Serve, as it
        forgets the replicas; for those on their way it goes on waiting.
        """
        alive, died = set[str](), -math.inf
        while True:
            try:
                before, alive = alive, await asyncio.to_thread(alive_nodes)
                now = asyncio.get_running_loop().time()
                died = now if before - alive else died
                if now - died < AFTERMATH_S:
                    self.take_back(now - UNTAKEN_S)
            except Exception as error:
                log.warning("cannot tell whether nodes have died: %s", error)
            await asyncio.sleep(WATCH_S)

    def take_back(self, sent_before: float) -> None:
        """End the calls that were sent earlier and that no replica has taken, as if it had died."""
        for response, sent in list(self._sent.items()):
            if sent < sent_before and response._replica_result_future.cancel():
                del self._sent[response]
                log.warning("a request that no replica takes is sent again: a node has died")

    async def describe(self, model: str, deadline: float) -> Description:
        """What serves a model name; raises as `ask`."""
        about: Description = await self.ask(model, "describe", deadline=deadline)
        return about

    async def call(
        self, request: Request, deadline: float, waiting: Waiting = NOBODY, target: Target | None = None
    ) -> Call:
        """Send a request to a replica of its model; returns once the replica has taken it.

        Args:
            deadline: when to give up, in the event loop's time.
            waiting: what waits here for the same model, told to the replica.
            target: default: where the request's model leads now.

        Raises:
            Refused: by the table, by the replica, or because none takes it in time.
        """
        target = target or self.target(request.model)
        handle = await self._handle(target.application)
        asked = (request, waiting, target.adapter)
        call = Call(lambda: self._noted(handle.options(stream=True).generate.remote(*asked)), deadline, self.wait_s)
        try:
            await call.accept()
        except BaseException:
            call.cancel()
            raise
        return call

    async def ask(self, model: str | Target, method: str, *args: Any, deadline: float) -> Any:
        """Call a method of a replica that answers once, again on another one where that dies; raises as `call`."""
        target = self.target(model) if isinstance(model, str) else model
        handle = await self._handle(target.application)
        retries = RETRIES
        while True:
            response = self._noted(getattr(handle, method).remote(*args))
            try:
                async with asyncio.timeout_at(deadline):
                    answer = await response
                break
            except TimeoutError as error:
                response.cancel()
                raise _late() from error
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _given_up():
                    response.cancel()
                    raise
                failure = _failed(error)
                if not (retries and isinstance(failure, ReplicaLost)):
                    raise failure from error
                retries -= response in self._sent  # else it was taken back, and has ended no replica
        if isinstance(answer, Problem):
            raise Refused(answer)
        return answer

    def only(self) -> str:
        """The name of the one model there is.

        Raises:
            Refused: 400 if there are several.
        """
        if len(self.table) != 1:
            message = "model is missing, and there are several: GET /v1/models lists those that you may call"
            raise Refused(Problem(status=400, message=message, param="model"))
        return next(iter(self.table))

    def base(self, model: str) -> str:
        """The model whose replicas answer for a name: another one's if it is an adapter."""
        return self._route(model).parent or model

    def check(self, model: str) -> None:
        """Raises `Refused`, 404, if there is no such model."""
        self._route(model)

    def _noted(self, response: Any) -> Any:
        self._sent[response] = asyncio.get_running_loop().time()
        return response

    def _route(self, model: str) -> Route:
        if model not in self.table:
            message = f"there is no model {model!r} here: GET /v1/models lists those that you may call"
            raise Refused(Problem(status=404, message=message, param="model", code="model_not_found"))
        return self.table[model]

    async def _handle(self, application: str) -> Any:
        if application in self.bound:
            return self.bound[application]
        if application not in self._found:
            try:
                self._found[application] = await asyncio.to_thread(serve.get_app_handle, application)
            except RayServeException as error:
                raise _failed(error) from error
        return self._found[application]


class ReplicaLost(Refused):
    """The replica that had the request died, or cannot be reached any more."""


class Call:
    """A request in a replica's hands: its deltas, and what they cost so far.

    A replica that dies before anybody has seen a delta is followed by another one, `RETRIES` times.

    Args:
        send: send the request to any replica; the items that come back, as `Replica.generate` says.
        deadline: when to give up, in the event loop's time.
        wait_s: how long to wait for a replica to take the request.
    """

    def __init__(self, send: Callable[[], Any], deadline: float, wait_s: float = math.inf) -> None:
        self._send = send
        self._deadline = deadline
        self._wait_s = wait_s
        self._retries = RETRIES
        self._items: Any = None
        self._open = False
        self.usage = Usage(0)
        self.ignored: tuple[str, ...] = ()
        """Fields of the request that the answer does not follow."""

    async def accept(self) -> None:
        """Send the request; wait until a replica has taken it or refused it."""
        deadline = min(self._deadline, asyncio.get_running_loop().time() + self._wait_s)
        while True:
            self._items, self._open = self._send(), True
            try:
                first = await self._next(deadline)
            except ReplicaLost as lost:
                if not self._items._replica_result_future.cancelled():  # taken back: it has ended no replica
                    self._retry(lost)
                continue
            except TimeoutError as error:
                raise _untaken() from error
            if isinstance(first, Problem):
                raise Refused(first)
            assert isinstance(first, Accepted)
            self.usage.prompt_tokens, self.ignored = first.prompt_tokens, first.ignored
            return

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Deltas as they come. Closing the iterator gives the request up.

        Raises:
            Refused: the replica failed, or the deadline has passed.
        """
        try:
            deltas = await self._first()
            while deltas is not None:
                for delta in deltas:
                    self.usage.add(delta)
                yield deltas
                deltas = await self._timely()
        finally:
            self.cancel()

    async def whole(self, got: Callable[[list[Delta]], None]) -> list[Delta]:
        """All deltas at once, for an answer of which nothing is sent before its end; raises as `deltas`.

        Args:
            got: told of deltas as they come; again from the first one if their replica dies.
        """
        while True:
            found: list[Delta] = []
            try:
                async for deltas in self.deltas():
                    got(deltas)
                    found += deltas
            except ReplicaLost as lost:
                self._retry(lost)
                self.usage = Usage(0)
                await self.accept()
                continue
            return found

    def cancel(self) -> None:
        """Give the request up, unless it has ended: Ray would raise again what ended it."""
        if self._open:
            self._open = False
            taken = self._items._replica_result_future
            self._items.cancel()
            # Ray forgets a call that a replica took in this very moment: it would stay open for good.
            if taken.done() and not taken.cancelled() and taken.exception() is None:
                taken.result().cancel()

    async def _first(self) -> list[Delta] | None:
        while True:
            try:
                return await self._timely()
            except ReplicaLost as lost:
                self._retry(lost)
                await self.accept()

    def _retry(self, lost: ReplicaLost) -> None:
        """Count a retry; raises what is given if there were too many."""
        if not self._retries:
            raise lost
        self._retries -= 1

    async def _timely(self) -> list[Delta] | None:
        try:
            deltas: list[Delta] | Problem | None = await self._next(self._deadline)
        except TimeoutError as error:
            raise _late() from error
        if isinstance(deltas, Problem):
            raise Refused(deltas)
        return deltas

    async def _next(self, deadline: float) -> Any:
        """The next item; none at the end. Raises TimeoutError at the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                item = await anext(self._items, None)
            self._open = item is not None
            return item
        except TimeoutError:
            self.cancel()
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and (_given_up() or not self._open):
                raise
            self._open = False
            raise _failed(error) from error


def _given_up() -> bool:
    """Whether it is our caller that has cancelled this; else Serve or `Routes.watch` did, whose node has died."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _late() -> Refused:
    message = "the request took longer than this server allows"
    return Refused(Problem(status=504, message=message, type="server_error", code="timeout"))


def _untaken() -> Refused:
    return Refused(_unavailable("no replica of this model took the request in time: try again later"))


def _unavailable(message: str, code: str = "unavailable") -> Problem:
    return Problem(status=503, message=message, type="server_error", code=code, retry_after_s=RETRY_AFTER_S)


def _failed(error: BaseException) -> Refused:
    """Why a replica did not answer. The cause goes to the log: it may hold what is not for clients."""
    if isinstance(error, BackPressureError):
        return Refused(overloaded("the server is at its limit: try again later"))
    if _lost(error):
        log.warning("a replica was lost with a request: %r", error)
        return ReplicaLost(_unavailable("the model's replica was lost: try again", "replica_lost"))
    if isinstance(error, grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Refused(_too_large(error))
    log.error("a replica failed", exc_info=error)
    if isinstance(error, RayServeException):
        return Refused(_unavailable("no replica of this model is running: try again later"))
    return Refused(
        Problem(status=500, message="the model's replica failed", type="server_error", code="replica_failed")
    )


def _too_large(error: grpc.aio.AioRpcError) -> Problem:
    """A message over `HttpConfig.message_bytes`: gRPC says by whom it was not taken."""
    log.warning("a message between gateway and replica is too large: %s", error.details())
    if "CLIENT" in (error.details() or ""):
        message = "the answer is too large to be sent at once: ask for less in one request, or for a stream"
        return Problem(status=500, message=message, type="server_error", code="answer_too_large")
    message = "the request is too large for its model's replica: send less in one request"
    return Problem(status=413, message=message, code="body_too_large")


def _lost(error: BaseException) -> bool:
    """Whether the replica is gone, in the forms that Ray's actors, gRPC and Serve give it."""
    if isinstance(error, asyncio.CancelledError):
        return True
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return isinstance(error, RayActorError | ReplicaUnavailableError) and not isinstance(error, RayTaskError)
