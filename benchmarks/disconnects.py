"""Clients that leave: what they held is freed at once, and nothing of them stays behind.

First requests are aborted one after the other at random moments: of the engine in this process, of which the steps are
counted that it still makes; and of clients of an endpoint, streaming and not, where the engine's own counts are watched
until nothing runs or waits. Then many short requests, a fifth of them aborted: memory, open files and event-loop tasks
of the gateway and the replica, after a warm-up and at the end.

The bars: the engine makes no step for what has been aborted but the one that is running; a client's place is free
within a second, the way of the news included; memory grows by at most 5 %; no slot, file or task is left.
"""

from __future__ import annotations

import asyncio
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
LONG_TOKENS = 400
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


def idle() -> bool:
    stats = engine_stats()
    return stats.running == 0 and stats.queued == 0


def freed_s() -> float:
    """Seconds until the engine has nothing to do; raises TimeoutError if it keeps something."""
    start = time.perf_counter()
    while not idle():
        if time.perf_counter() - start > SETTLE_S:
            raise TimeoutError(f"the engine still has something after {SETTLE_S:g} s: {engine_stats()}")
    return time.perf_counter() - start


async def steps_after_abort(model_dir: Path, count: int) -> list[int]:
    """Decode steps that the engine ends for a request after it was told to abort it."""
    engine, draw, found = TransformersEngine(str(model_dir), EngineConfig(), threads=1), random.Random(13), list[int]()
    for number in range(count):
        asked = GenerateRequest(str(number), [5, 6, 7], LONG_TOKENS, sampling=Sampling(logit_bias=((0, -100.0),)))
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


def round_trip_s() -> float:
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        engine_stats()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


async def aborts(url: str, count: int, longest_s: float) -> dict[bool, list[float]]:
    """Streaming or not -> seconds from each abort until its slot was free; what finished before does not count."""
    draw, found = random.Random(11), dict[bool, list[float]]({True: [], False: []})
    async with client(url, timeout_s=60) as http:
        while sum(map(len, found.values())) < count:
            streaming = len(found[True]) <= len(found[False])
            fields = {"prompt": "def main", "max_tokens": LONG_TOKENS, "stream": streaming, "logit_bias": {"0": -100}}
            if await asked(http, draw.uniform(0, longest_s), **fields):
                found[streaming].append(await asyncio.to_thread(freed_s))
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


async def whole_s(url: str) -> float:
    """What a long request takes."""
    async with client(url, timeout_s=60) as http:
        fields = {"prompt": "def main", "max_tokens": LONG_TOKENS, "logit_bias": {"0": -100}}
        outcomes = [await request(http, **fields) for _ in range(4)]
    return statistics.median(outcome.total_s for outcome in outcomes[1:])


def main() -> int:
    count, short = (60, 1000) if quick() else (500, 20_000)
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = tiny_model(Path(temporary) / "model")
        steps = asyncio.run(steps_after_abort(model_dir, count))
        http = {"access_log": False}
        with serving(Path(temporary), model_dir, {"cpus": 0.5}, http) as endpoint:
            longest = asyncio.run(whole_s(endpoint.url))
            step, trip = longest / LONG_TOKENS, round_trip_s()
            freed = asyncio.run(aborts(endpoint.url, count, longest))
            warm = int(short * WARM_UP)
            aborted = asyncio.run(short_requests(endpoint.url, warm, CLIENTS))
            before = footprints()
            aborted += asyncio.run(short_requests(endpoint.url, short - warm, CLIENTS))
            after = footprints()
            left = engine_stats()
    rows: list[dict[str, Any]] = [
        {
            "what": f"{len(times)} aborts, {'streaming' if streaming else 'not streaming'}",
            "before": "",
            "after": "",
            "p50 ms": 1000 * statistics.median(times),
            "max ms": 1000 * max(times),
        }
        for streaming, times in freed.items()
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
    times = freed[True] + freed[False]
    bars = [
        Bar("steps_after_abort", max(steps), "<=", 1),
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
