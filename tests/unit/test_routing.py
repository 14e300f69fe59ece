"""Calls to replicas that die: what is sent again, how often, and what the caller sees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from raymodels.serve.engine import Delta
from raymodels.serve.replica import Accepted
from raymodels.serve.routing import RETRIES, Call, Route, Routes
from raymodels.serve.schema import Problem, Refused, read_completion

REQUEST = read_completion({"model": "m", "prompt": "x"})
ONE, TWO = [Delta(0, "a", 1)], [Delta(0, "b", 2, finish="length")]
LOST = ActorUnavailableError("gone", b"x" * 16)
UNTAKEN = ["no replica takes it"]
LOST_ONE = [LOST]


class Replicas:
    """A handle whose calls go to one script after the other; what is an exception in a script is raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.calls = 0
        self.cancelled = 0

    def options(self, stream: bool) -> SimpleNamespace:
        return SimpleNamespace(generate=SimpleNamespace(remote=lambda *_: Items(self, self._next())))

    @property
    def embed(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: asyncio.ensure_future(self._one(self._next())))

    def _next(self) -> list[Any]:
        self.calls += 1
        return self.scripts.pop(0)

    async def _one(self, script: list[Any]) -> Any:
        return await anext(played(script))


class Items:
    def __init__(self, replicas: Replicas, script: list[Any]) -> None:
        self._replicas, self._items = replicas, played(script)
        self._untaken = script == UNTAKEN
        self._replica_result_future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> Any:
        return await (self._replica_result_future if self._untaken else anext(self._items))

    def cancel(self) -> None:
        self._replicas.cancelled += 1


async def played(script: list[Any]) -> AsyncIterator[Any]:
    for item in script:
        if item is None:
            await asyncio.sleep(60)
        if isinstance(item, BaseException):
            raise item
        yield item


def play(
    use: Callable[[Call], Any], *scripts: list[Any], seconds: float = 5, wait_s: float = 5
) -> tuple[Any, Replicas]:
    """What comes of a call to replicas with these scripts: the result of ``use``, or the problem."""
    replicas = Replicas(*scripts)
    routes = Routes({"m": Route({"m--v1": 1.0})}, {"m--v1": replicas}, wait_s)

    async def main() -> Any:
        try:
            return await use(await routes.call(REQUEST, asyncio.get_running_loop().time() + seconds))
        except Refused as refused:
            return refused.problem

    return asyncio.run(main()), replicas


async def streamed(call: Call) -> list[Any]:
    """What a stream's client sees; a problem at the end, if it failed."""
    seen: list[Any] = []
    try:
        async for deltas in call.deltas():
            seen.append(deltas)
    except Refused as refused:
        seen.append(refused.problem.code)
    return [*seen, call.usage.prompt_tokens, call.usage.completion_tokens]


async def whole(call: Call) -> list[Any]:
    return [*await call.whole(lambda deltas: None), call.usage.prompt_tokens, call.usage.completion_tokens]


@pytest.mark.parametrize("lost", [LOST, ActorDiedError(), asyncio.CancelledError()])  # Ray's, of a node cut off
@pytest.mark.parametrize("before", [[], [Accepted(3)]])
def test_an_unstarted_stream_is_sent_again(lost: BaseException, before: list[Any]) -> None:
    seen, replicas = play(streamed, [*before, lost], [*before, lost], [Accepted(3), ONE, TWO])
    assert seen == [ONE, TWO, 3, 2]
    assert (replicas.calls, replicas.cancelled) == (3, 0)


def test_what_a_dead_node_has_not_taken_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = iter([{"one", "other"}] * 3 + [{"one"}] * 99)
    monkeypatch.setattr("raymodels.serve.routing.alive_nodes", lambda: next(alive))
    monkeypatch.setattr("raymodels.serve.routing.WATCH_S", 0.05)
    monkeypatch.setattr("raymodels.serve.routing.UNTAKEN_S", 0.1)
    taken_back = 2 * RETRIES  # they do not count
    replicas = Replicas(*[UNTAKEN] * taken_back, LOST_ONE, [Accepted(3), ONE, TWO])
    routes = Routes({"m": Route({"m--v1": 1.0})}, {"m--v1": replicas})

    async def main() -> list[Any]:
        watching = asyncio.create_task(routes.watch())
        seen = await streamed(await routes.call(REQUEST, asyncio.get_running_loop().time() + 5))
        watching.cancel()
        return seen

    assert asyncio.run(main()) == [ONE, TWO, 3, 2]
    assert replicas.calls == taken_back + 2


def test_what_waits_for_a_replica_waits_on_while_no_node_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymodels.serve.routing.alive_nodes", lambda: {"one"})
    monkeypatch.setattr("raymodels.serve.routing.WATCH_S", 0.01)
    monkeypatch.setattr("raymodels.serve.routing.UNTAKEN_S", 0.0)
    replicas = Replicas(UNTAKEN)
    routes = Routes({"m": Route({"m--v1": 1.0})}, {"m--v1": replicas})

    async def main() -> None:
        watching = asyncio.create_task(routes.watch())
        with pytest.raises(Refused, match="in time"):
            await routes.call(REQUEST, asyncio.get_running_loop().time() + 0.3)
        watching.cancel()

    asyncio.run(main())
    assert replicas.calls == 1


@pytest.mark.parametrize("taken", ["in this moment", "not yet", "in vain"])
def test_a_call_given_up_as_a_replica_takes_it_is_cancelled_there(taken: str) -> None:
    replicas, cancelled_there = Replicas([None]), list[str]()

    async def main() -> None:
        items = Items(replicas, [None])
        if taken == "in this moment":
            there = SimpleNamespace(cancel=lambda: cancelled_there.append(taken))
            items._replica_result_future.set_result(there)
        elif taken == "in vain":
            items._replica_result_future.set_exception(LOST)
        call = Call(lambda: items, asyncio.get_running_loop().time() + 60)
        accepting = asyncio.create_task(call.accept())
        await asyncio.sleep(0)
        accepting.cancel()
        await asyncio.wait([accepting])
        call.cancel()

    asyncio.run(main())
    assert (replicas.cancelled, cancelled_there) == (1, ["in this moment"] if taken == "in this moment" else [])


def test_a_started_stream_is_not_sent_again() -> None:
    seen, replicas = play(streamed, [Accepted(3), ONE, LOST])
    assert seen == [ONE, "replica_lost", 3, 1]
    assert replicas.calls == 1


def test_what_nobody_has_seen_yet_is_computed_again() -> None:
    seen, replicas = play(whole, [Accepted(3), ONE, LOST], [LOST], [Accepted(3), ONE, TWO])
    assert seen == [*ONE, *TWO, 3, 2]
    assert replicas.calls == 3


@pytest.mark.parametrize("use", [streamed, whole])
def test_a_request_that_ends_its_replicas_is_given_up(use: Any) -> None:
    problem, replicas = play(use, *[[LOST]] * 9)
    assert (problem.status, problem.code, replicas.calls) == (503, "replica_lost", RETRIES + 1)
    assert problem.retry_after_s >= 1


@pytest.mark.parametrize(
    ("item", "status"),
    [
        (Problem(status=429, message="full"), 429),
        (ValueError("a fault of the request"), 500),
        (DeploymentUnavailableError(SimpleNamespace(name="m")), 503),
    ],
)
def test_nothing_else_is_sent_again(item: Any, status: int) -> None:
    problem, replicas = play(whole, [item])
    assert (problem.status, replicas.calls) == (status, 1)


def test_waiting_for_a_replica_ends() -> None:
    start = time.monotonic()
    problem, replicas = play(whole, [None], wait_s=0.05)
    assert (problem.status, problem.code, replicas.cancelled) == (503, "unavailable", 1)
    assert problem.retry_after_s >= 1
    problem, _ = play(whole, [None], seconds=0.05)
    assert problem.status == 503
    problem, replicas = play(whole, [Accepted(3), None], seconds=0.5)
    assert (problem.status, replicas.cancelled) == (504, 1)
    assert time.monotonic() - start < 5


def test_what_is_answered_at_once_is_asked_again() -> None:
    replicas = Replicas([LOST], ["vector"])
    routes = Routes({"m": Route({"m--v1": 1.0})}, {"m--v1": replicas})

    async def main() -> Any:
        return await routes.ask("m", "embed", REQUEST, deadline=asyncio.get_running_loop().time() + 5)

    assert asyncio.run(main()) == "vector"
    assert replicas.calls == 2
