"""Clients that leave: what they held is freed at once, and nothing of them stays behind.

First requests for long answers are aborted one after the other at random moments: of the engine in this process, of
which the steps are counted that it still makes; of the same while it is busy with others, some as soon as they are
made; and of clients of an endpoint that is idle or busy, streaming and not, where the engine's own counts are watched
until nothing runs or waits but what others still listen to. Then many short requests, a fifth of them aborted: memory,
open files and event-loop tasks of the gateway and the replica, after a warm-up and at the end.

The bars: the engine makes no step for what has been aborted but the one that is running, or is about to be; a client's
place is free within a second, the way of the news included; memory grows by at most 5 %; no slot, file or task is left.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]

from benchmarks.endpoint import client, engine_stats, gateway_process, replica_processes, request, serving, tiny_model
from benchmarks.report import Bar, quick, report
from raymodels.config import EngineConfig
from raymodels.serve.engine import GenerateRequest, Sampling
from raymodels.serve.replica import Process
from raymodels.serve.transformers_engine import TransformersEngine

CLIENTS = 8
CONTEXT, LONG_TOKENS = 4096, 2000
LEAVE_S = (0.05, 0.5)
"""Clients leave at a random moment within one of these, long before their answers end."""
UNENDING = {0: -100.0}
"""Bias of the token that ends a text."""
SETTLE_S = 20.0
WARM_UP = 0.4
"""The part of the short requests after which memory is to be flat."""


@dataclass
class Footprint:
    """What a process holds when nobody asks it anything."""

    name: str
    memory: int
    files: int
    tasks: int


async def asked(http: aiohttp.ClientSession, abort_after_s: float | None, **fields: Any) -> bool:
    """Send a request; whether it was aborted before it ended."""
    asking = asyncio.create_task(request(http, **fields))
    await asyncio.wait([asking], timeout=abort_after_s)
    asking.cancel()
    outcome = (await asyncio.gather(asking, return_exceptions=True))[0]
    return isinstance(outcome, asyncio.CancelledError)


def freed_s(others: int = 0) -> float:
    """Seconds until the engine has no more to do than others listen to; raises TimeoutError if it keeps something."""
    start = time.perf_counter()
    while (stats := engine_stats()).running + stats.queued > others:
        if time.perf_counter() - start > SETTLE_S:
            raise TimeoutError(f"the engine still has something after {SETTLE_S:g} s: {stats}")
    return time.perf_counter() - start


async def steps_after_abort(model_dir: Path, count: int) -> list[int]:
    """Decode steps that the engine ends for a request after it was told to abort it."""
    engine, draw, found = TransformersEngine(str(model_dir), EngineConfig(), threads=1), random.Random(13), list[int]()
    for number in range(count):
        asked = long_request(str(number))
        leave_after = draw.uniform(0, 0.2)
        start = time.perf_counter()
        async for _ in engine.generate(asked):
            if time.perf_counter() - start > leave_after:
                engine.abort(asked.id)
                before = engine.stats().tokens_out
                break
        while engine.stats().running:
            await asyncio.sleep(0)
        found.append(engine.stats().tokens_out - before)
    engine.close()
    return found


def long_request(id: str) -> GenerateRequest:
    return GenerateRequest(id, [5, 6, 7], LONG_TOKENS, sampling=Sampling(logit_bias=tuple(UNENDING.items())))


async def orphans_of_a_busy_engine(model_dir: Path, count: int) -> list[int]:
    """Choices that are in the batch a few steps after each abort, though nobody listens to them."""
    engine, draw, found = TransformersEngine(str(model_dir), EngineConfig(), threads=1), random.Random(14), list[int]()

    async def listen(client: int) -> None:
        for turn in itertools.count():
            async for _ in engine.generate(long_request(f"client {client}, {turn}")):
                pass

    clients = [asyncio.create_task(listen(number)) for number in range(CLIENTS)]
    while engine.stats().running < CLIENTS:
        await asyncio.sleep(0)
    for number in range(count):
        engine.generate(long_request(str(number)))
        await asyncio.sleep(draw.choice((0, draw.uniform(0, 0.005), draw.uniform(0, 0.1))))
        engine.abort(str(number))
        stats = engine.stats()
        while engine.stats().tokens_out < stats.tokens_out + 4 * (stats.running + 1):
            await asyncio.sleep(0)
        found.append(max(0, engine.stats().running - CLIENTS))
    for task in clients:
        task.cancel()
    engine.close()
    return found


def round_trip_s() -> float:
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        engine_stats()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


async def aborts(url: str, count: int, others: int) -> dict[bool, list[float]]:
    """Streaming or not -> seconds from each abort until its slot was free.

    Args:
        others: clients that are answered at the same time; the last slots are those that they leave at the end.
    """
    draw, found = random.Random(11), dict[bool, list[float]]({True: [], False: []})
    fields = {"prompt": "def main", "max_tokens": LONG_TOKENS, "logit_bias": UNENDING}

    async def listen() -> None:
        while True:
            await request(http, stream=True, **fields)

    async with client(url, timeout_s=60) as http:
        busy = [asyncio.create_task(listen()) for _ in range(others)]
        await asyncio.sleep(1 if others else 0)
        while sum(map(len, found.values())) < count:
            streaming = len(found[True]) <= len(found[False])
            if await asked(http, draw.uniform(0, draw.choice(LEAVE_S)), stream=streaming, **fields):
                found[streaming].append(await asyncio.to_thread(freed_s, others))
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    found[True].append(await asyncio.to_thread(freed_s))
    return found


async def short_requests(url: str, count: int, clients: int) -> int:
    """Requests of which a fifth is aborted within the time that they take; how many were.

    Some that were to leave are answered before; others then leave for them.
    """
    draw, left, aborted = random.Random(12), count, 0

    async def ask(http: aiohttp.ClientSession) -> None:
        nonlocal left, aborted
        while left > 0:
            left -= 1
            leaves = draw.uniform(0, 0.05) if aborted < (count - left) / 5 else None
            fields = {"prompt": "def main", "max_tokens": draw.randint(1, 4), "stream": draw.random() < 0.5}
            gone = await asked(http, leaves, **fields)
            aborted += gone

    async with client(url, timeout_s=60) as http:
        await asyncio.gather(*(ask(http) for _ in range(clients)))
    return aborted


def footprints() -> list[Footprint]:
    """Of the gateway and the replica, once they are at rest."""
    freed_s()
    time.sleep(2)  # connections that were kept alive close, and with them their tasks

    def of(name: str, process: Process) -> Footprint:
        seen = psutil.Process(process.pid)
        return Footprint(name, seen.memory_info().rss, seen.num_fds(), process.tasks)

    replica = next(iter(replica_processes(1).values()))
    return [of("gateway", gateway_process()), of("replica", replica)]


async def step_s(url: str) -> float:
    """What one token of a request takes."""
    async with client(url, timeout_s=60) as http:
        fields = {"prompt": "def main", "max_tokens": 200, "logit_bias": UNENDING}
        outcomes = [await request(http, **fields) for _ in range(4)]
    return statistics.median(outcome.total_s / outcome.tokens for outcome in outcomes[1:])


def main() -> int:
    count, short = (60, 1000) if quick() else (500, 20_000)
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = tiny_model(Path(temporary) / "model", context=CONTEXT)
        steps = asyncio.run(steps_after_abort(model_dir, count))
        orphans = asyncio.run(orphans_of_a_busy_engine(model_dir, count))
        http = {"access_log": False}
        with serving(Path(temporary), model_dir, {"cpus": 0.5}, http) as endpoint:
            step, trip = asyncio.run(step_s(endpoint.url)), round_trip_s()
            freed = {others: asyncio.run(aborts(endpoint.url, count, others)) for others in (0, CLIENTS)}
            warm = int(short * WARM_UP)
            aborted = asyncio.run(short_requests(endpoint.url, warm, CLIENTS))
            before = footprints()
            aborted += asyncio.run(short_requests(endpoint.url, short - warm, CLIENTS))
            after = footprints()
            left = engine_stats()
    rows: list[dict[str, Any]] = [
        {
            "what": f"{len(times)} aborts beside {others} others, {'streaming' if streaming else 'not streaming'}",
            "before": "",
            "after": "",
            "p50 ms": 1000 * statistics.median(times),
            "max ms": 1000 * max(times),
        }
        for others, found in freed.items()
        for streaming, times in found.items()
    ]
    rows += [
        {"what": f"{then.name}: {kind}", "before": getattr(then, field), "after": getattr(now, field)}
        | {"p50 ms": "", "max ms": ""}
        for then, now in zip(before, after, strict=True)
        for kind, field in [("bytes of memory", "memory"), ("open files", "files"), ("tasks", "tasks")]
    ]
    rows.append(
        {"what": f"{short:,} short requests, aborted", "before": "", "after": aborted, "p50 ms": "", "max ms": ""}
    )
    rows.append(
        {"what": "decode step, round trip", "before": "", "after": "", "p50 ms": 1000 * step, "max ms": 1000 * trip}
    )
    times = [time for found in freed.values() for times in found.values() for time in times]
    bars = [
        Bar("steps_after_abort", max(steps), "<=", 1),
        Bar("orphans_of_a_busy_engine", max(orphans), "==", 0),
        Bar("freed_max_ms", 1000 * max(times), "<=", 1000),
        Bar("slots_left", left.running + left.queued, "==", 0),
        Bar(
            "memory_growth", max(now.memory / then.memory for then, now in zip(before, after, strict=True)), "<=", 1.05
        ),
        Bar(
            "files_left", sum(max(0, now.files - then.files) for then, now in zip(before, after, strict=True)), "==", 0
        ),
        Bar(
            "tasks_left", sum(max(0, now.tasks - then.tasks) for then, now in zip(before, after, strict=True)), "==", 0
        ),
    ]
    return report("disconnects", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
