"""Quotas and the fair queue: who waits, who is refused, and what an overload does to the others. In virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from raymodels.config import HttpConfig, TenantConfig
from raymodels.serve.admission import Admission, Queue, Turn
from raymodels.serve.fair_queue import Line, Room, Slot
from raymodels.serve.quotas import Bucket, Quotas, check_prompt, estimated_tokens, limited, sequences
from raymodels.serve.schema import Refused, read_chat, read_completion, read_embedding
from tests.unit.virtual_time import run

FAR = 1e9


def tenant(name: str = "a", **limits: Any) -> TenantConfig:
    return TenantConfig(name=name, keys=(), **limits)


def admission(running: int = 1, waiting: int = 10_000, tokens: int = 10**9) -> Admission:
    return Admission(lambda _: Room(running, waiting, tokens), Quotas())


async def work(
    admission: Admission,
    tenant: TenantConfig,
    seconds: float,
    tokens: int = 100,
    sequences: int = 1,
    deadline: float = FAR,
    used: int | None = None,
) -> float:
    """One request, each sequence of which takes so many seconds; returns how long it took, waiting and served."""
    start = asyncio.get_running_loop().time()

    async def compute(places: int) -> None:
        await asyncio.sleep(seconds)
        turn.done(places)

    with admission._quotas.request(tenant, start):  # as every request is by the front
        async with admission.slot(tenant, "m", tokens, sequences, deadline) as turn:
            if turn.waiting:
                await in_parts(turn, compute)
            else:
                await asyncio.sleep(seconds)
            turn.used_tokens = tokens if used is None else used
    return asyncio.get_running_loop().time() - start


async def in_parts(turn: Turn, compute: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    left = turn.sequences
    try:
        async with asyncio.TaskGroup() as parts:
            while left:
                places = await turn.places()
                parts.create_task(compute(places))
                left -= places
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


def problem(refused: BaseException) -> Any:
    assert isinstance(refused, Refused), refused
    return refused.problem


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def empty(admission: Admission) -> bool:
    queue = admission.queue("m")
    counts = (queue.running, queue.running_sequences, queue.waiting, queue.waiting_sequences, queue.waiting_tokens)
    return counts == (0, 0, 0, 0, 0)


def test_what_has_room_does_not_wait() -> None:
    async def main() -> list[float]:
        door = admission(running=4)
        return await asyncio.gather(*(work(door, tenant(), 1.0) for _ in range(4)))

    assert run(main()) == [1.0] * 4


def test_no_more_run_than_the_model_has_room_for() -> None:
    async def main() -> list[float]:
        door = admission(running=2)
        took = await asyncio.gather(*(work(door, tenant(), 1.0) for _ in range(6)))
        assert empty(door)
        return took

    assert run(main()) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_a_request_larger_than_the_room_is_served_in_parts_beside_others() -> None:
    async def main() -> list[float]:
        door = admission(running=2)
        return await asyncio.gather(
            work(door, tenant(), 1.0), work(door, tenant(), 1.0, sequences=5), work(door, tenant(), 1.0)
        )

    assert run(main()) == [1.0, 3.0, 4.0]  # its five as 1, 2 and 2


def test_the_last_places_are_for_who_holds_no_more_than_those() -> None:
    async def main() -> tuple[list[float], list[float], bool]:
        door = Admission(lambda _: Room(4, 100, 10**6, reserved=1), Quotas())
        loud = [asyncio.create_task(work(door, tenant("loud"), 1.0)) for _ in range(6)]
        await settled()
        quiet = [asyncio.create_task(work(door, tenant("quiet"), 1.0)) for _ in range(2)]
        found = await asyncio.gather(*loud), await asyncio.gather(*quiet)
        return *found, empty(door)

    loud, quiet, over = run(main())
    assert loud == [1.0, 1.0, 1.0, 2.0, 2.0, 3.0]  # three together, though the model has room for four
    assert quiet == [1.0, 2.0]
    assert over


def test_a_large_request_waits_its_turn_while_others_use_what_is_reserved() -> None:
    async def main() -> list[float]:
        door = Admission(lambda _: Room(4, 100, 10**6, reserved=1), Quotas())
        tasks = [asyncio.create_task(work(door, tenant("loud"), 1.0)) for _ in range(2)]
        await settled()
        tasks += [asyncio.create_task(work(door, tenant("large"), 1.0, sequences=3))]
        await settled()
        tasks += [asyncio.create_task(work(door, tenant("small"), 0.5)) for _ in range(2)]
        return await asyncio.gather(*tasks)

    assert run(main()) == [1.0, 1.0, 2.0, 0.5, 1.0]  # large's as 1, and 2 once loud is done


async def overload(aggressor_rate: float, aggressor: TenantConfig, victim: TenantConfig) -> tuple[list[float], int]:
    """A pool of 8 that serves 8 requests a second; the victim sends 1.6 a second for 500 s. Its latencies, and how
    many of the aggressor's were refused."""
    door, rng = admission(running=8, waiting=256), random.Random(17)
    loop, latencies, refused = asyncio.get_running_loop(), list[float](), 0

    async def one(who: TenantConfig) -> None:
        nonlocal refused
        try:
            took = await work(door, who, rng.uniform(0.5, 1.5), tokens=rng.randint(50, 150))
        except Refused as error:
            assert who is aggressor, "the victim is refused nothing"
            assert error.problem.status == 429
            assert error.problem.retry_after_s
            refused += 1
        else:
            if who is victim:
                latencies.append(took)

    async def arrivals(who: TenantConfig, rate: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            while loop.time() < 500:
                await asyncio.sleep(rng.expovariate(rate))
                tasks.create_task(one(who))

    async with asyncio.TaskGroup() as sources:
        sources.create_task(arrivals(victim, 1.6))
        if aggressor_rate:
            sources.create_task(arrivals(aggressor, aggressor_rate))
    assert empty(door)
    return latencies, refused


def test_an_overload_of_five_times_by_one_key_does_not_double_the_others_p99() -> None:
    alone, _ = run(overload(0, tenant("loud"), tenant("quiet")))
    together, refused = run(overload(40, tenant("loud"), tenant("quiet")))
    assert refused > 1000
    assert p99(together) <= 2 * p99(alone)
    assert p99(together) > p99(alone)  # or nothing was measured


def test_first_come_first_served_would_do_worse() -> None:
    """The check can fail: with both under one key, the quiet one waits as long as all do."""
    alone, _ = run(overload(0, tenant("loud"), tenant("quiet")))
    shared = tenant("both")

    async def one_line() -> list[float]:
        door, rng, took = admission(running=8, waiting=256), random.Random(17), list[float]()

        async def one(quiet: bool) -> None:
            try:
                seconds = await work(door, shared, rng.uniform(0.5, 1.5))
            except Refused:
                return
            if quiet:
                took.append(seconds)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(10_000):
                await asyncio.sleep(rng.expovariate(41.6))
                tasks.create_task(one(rng.random() < 1.6 / 41.6))
        return took

    assert p99(run(one_line())) > 5 * p99(alone)


@pytest.mark.parametrize(("priority", "share"), [(1, 0.5), (3, 0.75)])
def test_a_busy_model_is_shared_by_priority(priority: int, share: float) -> None:
    async def main() -> float:
        door, served = admission(running=4), {"a": 0, "b": 0}

        async def always(who: TenantConfig, tokens: int) -> None:
            while asyncio.get_running_loop().time() < 300:
                await work(door, who, 1.0, tokens)
                served[who.name] += tokens

        async with asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(always(tenant("a", priority=priority), 100))
            for _ in range(60):
                tasks.create_task(always(tenant("b"), 30))
        return served["a"] / sum(served.values())

    assert run(main()) == pytest.approx(share, abs=0.05)


def test_what_a_request_really_took_counts_not_what_it_asked_for() -> None:
    """Two tenants use the same; one asks for ten times as much, and gets as many turns."""

    async def main() -> dict[str, int]:
        door, served = admission(running=1), {"modest": 0, "greedy": 0}

        async def always(who: TenantConfig, asked: int) -> None:
            while asyncio.get_running_loop().time() < 400:
                await work(door, who, 1.0, asked, used=100)
                served[who.name] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(always(tenant("modest"), 100))
                tasks.create_task(always(tenant("greedy"), 1000))
        return served

    served = run(main())
    assert served["greedy"] == pytest.approx(served["modest"], rel=0.1)


def test_a_full_queue_refuses_the_newest_of_the_longest_line() -> None:
    async def main() -> None:
        door, loud, quiet = admission(waiting=3), tenant("loud"), tenant("quiet")
        first = [asyncio.create_task(work(door, loud, 1.0)) for _ in range(4)]
        await settled()
        with pytest.raises(Refused) as refused:
            await work(door, loud, 1.0)
        assert (problem(refused.value).status, problem(refused.value).code) == (429, "queue_full")
        assert await work(door, quiet, 1.0) == 2.0  # its turn comes before loud's second
        results = await asyncio.gather(*first, return_exceptions=True)
        assert results[:3] == [1.0, 3.0, 4.0]
        assert problem(results[3]).code == "queue_full"  # the last one gave way to quiet
        assert empty(door)

    run(main())


def test_the_queue_is_bounded_in_tokens() -> None:
    async def main() -> None:
        door = admission(tokens=1000)
        running = asyncio.create_task(work(door, tenant(), 10.0))
        await settled()
        waiting = asyncio.create_task(work(door, tenant(), 1.0, tokens=5000))  # alone in the queue: it may
        await settled()
        with pytest.raises(Refused) as refused:
            await work(door, tenant(), 1.0, tokens=1)
        assert problem(refused.value).retry_after_s >= 1
        await asyncio.gather(running, waiting)
        assert empty(door)

    run(main())


def test_who_leaves_the_queue_is_dropped_at_once() -> None:
    async def main() -> None:
        door = admission()
        running = asyncio.create_task(work(door, tenant(), 10.0))
        waiting = [asyncio.create_task(work(door, tenant(), 1.0)) for _ in range(3)]
        await settled()
        waiting[0].cancel()
        waiting[1].cancel()
        await settled()
        assert (door.queue("m").waiting, door.queue("m").waiting_tokens) == (1, 100)
        await running
        assert await waiting[2] == 11.0
        assert empty(door)

    run(main())


def test_leaving_at_the_moment_of_ones_turn_loses_no_place() -> None:
    """Cancelled in the same turn of the event loop in which the place became free, before and after."""

    async def main(cancel_first: bool) -> None:
        door, holder = admission(), tenant("holder")
        enter = door.slot(holder, "m", 1, 1, FAR)
        await enter.__aenter__()
        leaver = asyncio.create_task(work(door, tenant("leaver"), 1.0))
        await settled()
        if cancel_first:
            leaver.cancel()
        await enter.__aexit__(None, None, None)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert empty(door)
        assert await work(door, tenant("next"), 1.0) == 1.0

    run(main(cancel_first=True))
    run(main(cancel_first=False))


def test_a_random_storm_of_leavers_and_deadlines_leaves_nothing_behind() -> None:
    async def main() -> None:
        door, rng, loop = admission(running=4, waiting=20, tokens=2500), random.Random(3), asyncio.get_running_loop()
        tasks = []
        for number in range(3000):
            await asyncio.sleep(rng.expovariate(10))
            who = tenant("abc"[number % 3], concurrency=5)
            request = work(door, who, rng.uniform(0, 2), rng.randint(1, 300), rng.randint(1, 6), loop.time() + 3)
            tasks.append(asyncio.create_task(request))
            if rng.random() < 0.3:
                loop.call_later(rng.uniform(0, 2), tasks[-1].cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {problem(r).code if isinstance(r, Refused) else type(r).__name__ for r in results}
        assert kinds == {"float", "CancelledError", "queue_full", "timeout", "requests_at_once_exceeded"}
        assert empty(door)
        assert all(account.open == 0 for account in door._quotas._accounts.values())

    run(main())


def test_whose_turn_it_is_has_had_least_however_they_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that is kept, against the one that is looked for."""
    turns = 0
    kept = Queue._least_served

    def checked(queue: Queue) -> Line:
        nonlocal turns
        turns += 1
        line = kept(queue)
        assert line.slots and line.served == min(other.served for other in queue._lines.values() if other.slots)
        return line

    async def main() -> None:
        door, rng, loop = admission(running=4, waiting=60), random.Random(5), asyncio.get_running_loop()
        tasks = []
        for _ in range(3000):
            await asyncio.sleep(rng.expovariate(4))
            who = tenant(rng.choice("aaaaabbcdefgh"), priority=rng.randint(1, 3))
            asked, used = rng.randint(1, 300), rng.randint(0, 500)  # more than was asked for, or less
            deadline = loop.time() + rng.uniform(1, 30)
            tasks.append(asyncio.create_task(work(door, who, rng.uniform(0, 2), asked, 1, deadline, used)))
        await asyncio.gather(*tasks, return_exceptions=True)
        assert empty(door)
        assert door.queue("m")._order == []

    monkeypatch.setattr(Queue, "_least_served", checked)
    run(main())
    assert turns > 3000


def test_a_deadline_that_passes_in_the_queue_is_504() -> None:
    async def main() -> None:
        door = admission()
        running = asyncio.create_task(work(door, tenant(), 10.0))
        await settled()
        with pytest.raises(Refused) as refused:
            await work(door, tenant(), 1.0, deadline=4.0)
        assert asyncio.get_running_loop().time() == pytest.approx(4.0)
        assert problem(refused.value).status == 504
        await running
        assert empty(door)

    run(main())


def test_more_replicas_let_more_in() -> None:
    room = Room(1, 100, 10_000)

    async def main() -> float:
        nonlocal room
        door = Admission(lambda _: room, Quotas())
        tasks = [asyncio.create_task(work(door, tenant(), 1.0)) for _ in range(4)]
        await asyncio.sleep(0.5)
        room = Room(4, 100, 10_000)
        door.dispatch()
        return max(await asyncio.gather(*tasks))

    assert run(main()) == 1.5


def test_requests_per_minute() -> None:
    async def main() -> None:
        door, who = admission(running=10), tenant(requests_per_minute=6)
        await asyncio.gather(*(work(door, who, 0) for _ in range(6)))
        with pytest.raises(Refused) as refused:
            await work(door, who, 0)
        assert problem(refused.value).code == "requests_per_minute_exceeded"
        assert problem(refused.value).retry_after_s == 10
        await asyncio.sleep(10)
        await work(door, who, 0)
        await work(door, tenant("other", requests_per_minute=6), 0)

    run(main())


def test_tokens_per_minute_are_settled_with_what_was_used() -> None:
    async def main() -> None:
        door, who = admission(running=10), tenant(tokens_per_minute=1000)
        for _ in range(10):
            await work(door, who, 0, tokens=500, used=50)  # 500 in all, though 5,000 were asked for
        with pytest.raises(Refused) as refused:
            await work(door, who, 0, tokens=900)
        assert problem(refused.value).code == "tokens_per_minute_exceeded"
        assert problem(refused.value).retry_after_s == 24
        await asyncio.sleep(24)
        await work(door, who, 0, tokens=900, used=4000)  # more than was reserved: a debt
        with pytest.raises(Refused) as refused:
            await work(door, who, 0, tokens=1)
        assert problem(refused.value).retry_after_s == pytest.approx(60 * 3.1, abs=1)

    run(main())


def test_more_than_a_minutes_tokens_need_a_full_minute() -> None:
    bucket = Bucket()
    assert bucket.wait_s(5000, 1000, now=0) == 0
    bucket.take(5000)
    assert bucket.wait_s(5000, 1000, now=0) == pytest.approx(300)
    assert bucket.wait_s(5000, 1000, now=300) == 0


def test_a_new_limit_holds_at_once_and_none_keeps_no_debt() -> None:
    async def main() -> None:
        door = admission(running=10)
        for _ in range(100):
            await work(door, tenant(), 0, tokens=1000)
        await work(door, tenant(tokens_per_minute=2000, requests_per_minute=1), 0, tokens=1000)

    run(main())


def test_concurrency_counts_waiting_and_running() -> None:
    async def main() -> None:
        door, who = admission(), tenant(concurrency=2)
        tasks = [asyncio.create_task(work(door, who, 1.0)) for _ in range(2)]
        await settled()
        with pytest.raises(Refused) as refused:
            await work(door, who, 1.0)
        assert problem(refused.value).code == "requests_at_once_exceeded"
        await asyncio.gather(*tasks)
        assert await work(door, who, 1.0) == 1.0

    run(main())


def test_several_gateways_grant_a_part_each() -> None:
    async def main() -> int:
        door, granted = Admission(lambda _: Room(10, 10, 10**6), Quotas(gateways=4)), 0
        for _ in range(20):
            try:
                await work(door, tenant(requests_per_minute=20), 0)
            except Refused:
                continue
            granted += 1
        return granted

    assert run(main()) == 5


COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def test_an_estimate_counts_every_choice() -> None:
    request = read_completion(COMPLETION | {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 10})
    assert sequences(request) == 6
    assert estimated_tokens(400, request) == 101 + 60
    assert estimated_tokens(0, read_completion(COMPLETION)) == 1 + 16
    assert estimated_tokens(0, read_completion(COMPLETION | {"max_tokens": 0, "echo": True})) == 1
    assert estimated_tokens(0, read_chat(CHAT)) == 1 + 256
    assert estimated_tokens(0, read_chat(CHAT | {"max_completion_tokens": 7})) == 8
    embedding = read_embedding({"model": "m", "input": ["a", "b"]})
    assert (sequences(embedding), estimated_tokens(40, embedding)) == (2, 11)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (COMPLETION | {"max_tokens": 11}, "max_tokens"),
        (CHAT | {"max_tokens": 11}, "max_tokens"),
        (CHAT | {"max_completion_tokens": 11}, "max_completion_tokens"),
    ],
)
def test_more_output_than_allowed_is_refused_by_field(body: dict[str, Any], field: str) -> None:
    request = read_chat(body) if "messages" in body else read_completion(body)
    assert limited(request, tenant(), HttpConfig()) is request
    with pytest.raises(Refused) as refused:
        limited(request, tenant(), HttpConfig(max_output_tokens=10))
    assert (problem(refused.value).status, problem(refused.value).param) == (400, field)
    assert limited(request, tenant(max_output_tokens=20), HttpConfig(max_output_tokens=10)) is request


def test_output_without_a_limit_gets_the_one_there_is() -> None:
    http = HttpConfig(max_output_tokens=10)
    assert limited(read_chat(CHAT), tenant(), http).max_completion_tokens == 10
    assert limited(read_completion(COMPLETION | {"max_tokens": 3}), tenant(), http).max_tokens == 3
    assert limited(read_completion(COMPLETION), tenant(max_output_tokens=4), http).max_tokens == 4


def test_a_completion_keeps_openais_default_under_a_larger_limit() -> None:
    assert limited(read_completion(COMPLETION), tenant(), HttpConfig(max_output_tokens=100)).max_tokens is None


def test_a_long_prompt_is_refused_once_its_tokens_are_known() -> None:
    for request, field in (
        (read_completion(COMPLETION), "prompt"),
        (read_chat(CHAT), "messages"),
        (read_embedding({"model": "m", "input": "x"}), "input"),
    ):
        check_prompt(10, tenant(), HttpConfig(max_prompt_tokens=10), request)
        with pytest.raises(Refused) as refused:
            check_prompt(11, tenant(), HttpConfig(max_prompt_tokens=10), request)
        assert (problem(refused.value).status, problem(refused.value).param) == (400, field)


def test_what_needs_no_place_is_under_the_quotas_and_does_not_wait() -> None:
    async def main() -> None:
        door, who = admission(), tenant(requests_per_minute=2)
        running = asyncio.create_task(work(door, tenant("other"), 10.0))
        await settled()
        assert await work(door, who, 0, tokens=0, sequences=0) == 0
        assert await work(door, who, 0, tokens=0, sequences=0) == 0
        with pytest.raises(Refused):
            await work(door, who, 0, tokens=0, sequences=0)
        await running

    run(main())


def test_a_slot_compares_by_identity() -> None:
    """Two equal requests of one tenant wait in one line; leaving takes the right one out."""
    assert Slot(1, 1) != Slot(1, 1)


@pytest.mark.parametrize(("seconds", "places"), [(0.15, 1), (1.0, 2), (30.0, 1)])
def test_a_full_queue_says_how_long_it_takes_to_empty(seconds: float, places: int) -> None:
    """Of requests that take a tenth of what they were estimated at."""

    async def main() -> tuple[int, float]:
        door, loop = admission(running=places, waiting=10), asyncio.get_running_loop()
        tasks = [asyncio.create_task(work(door, tenant(), seconds, used=10)) for _ in range(places + 10)]
        await asyncio.sleep(seconds * 2.5)
        tasks += [asyncio.create_task(work(door, tenant(), seconds, used=10)) for _ in range(2 * places)]
        await settled()
        with pytest.raises(Refused) as refused:
            await work(door, tenant(), seconds)
        told, since = problem(refused.value).retry_after_s, loop.time()
        while door.queue("m").waiting:
            await asyncio.sleep(seconds / 10)
        took = loop.time() - since
        await asyncio.gather(*tasks)
        return told, took

    told, took = run(main())
    assert 1 <= told <= 60
    assert min(took, 60) / 1.5 <= told <= took * 1.5 + 1


def test_before_anything_has_left_a_full_queue_says_as_long_again_as_it_took_so_far() -> None:
    async def main() -> list[int]:
        door, told = admission(waiting=3), list[int]()
        tasks = [asyncio.create_task(work(door, tenant(), 100.0)) for _ in range(4)]
        for _ in range(3):
            await settled()
            with pytest.raises(Refused) as refused:
                await work(door, tenant(), 1.0)
            told.append(problem(refused.value).retry_after_s)
            await asyncio.sleep(10)
        await asyncio.gather(*tasks)
        return told

    assert run(main()) == [1, 10, 20]
