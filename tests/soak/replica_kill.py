"""Replicas are killed with -9 under load, one after the other: how every request ends.

The bars: all requests end within the time that they have; all that are not streamed and all streams that had not begun
are answered in full; a stream that had begun is finished or ends with an error event.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.endpoint import Outcome, client, replica_processes, request, serving, tiny_model
from benchmarks.report import Bar, report
from tests.soak.size import small

CLIENTS = 8
REPLICAS = 2
DEADLINE_S = 60.0
SLACK_S = 5.0
"""For the way of an answer through a busy machine."""


async def load(url: str, stop: asyncio.Event, found: dict[bool, list[Outcome]]) -> None:
    """Clients that ask without a pause until told to stop; the outcomes, streamed or not."""
    draw = random.Random(5)

    async def ask(http: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            streaming = draw.random() < 0.5
            fields = {"prompt": "def main", "max_tokens": draw.randint(1, 300), "logit_bias": {"0": -100}}
            found[streaming].append(await request(http, stream=streaming, **fields))

    own = {"X-Request-Timeout": str(DEADLINE_S)}
    async with client(url, 2 * DEADLINE_S, own) as http:
        await asyncio.gather(*(ask(http) for _ in range(CLIENTS)))


async def kills(count: int) -> list[float]:
    """Kill a replica again and again, each time once there are as many as there should be; seconds until there were."""
    draw, taken, dead = random.Random(6), list[float](), set[int]()
    for _ in range(count):
        start = time.perf_counter()
        while dead & (pids := set(await asyncio.to_thread(replica_processes, REPLICAS))):
            await asyncio.sleep(0.2)
        taken.append(time.perf_counter() - start)
        await asyncio.sleep(draw.uniform(1, 3))
        victim = draw.choice(sorted(pids))
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
    return taken[1:]


async def measure(url: str, count: int) -> tuple[dict[bool, list[Outcome]], list[float]]:
    found, stop = dict[bool, list[Outcome]]({True: [], False: []}), asyncio.Event()
    asking = asyncio.create_task(load(url, stop, found))
    await asyncio.sleep(2)
    recovered = await kills(count)
    await asyncio.sleep(10)
    stop.set()
    await asking
    return found, recovered


def main() -> int:
    count = 3 if small() else 20
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = tiny_model(Path(temporary) / "model")
        model = {"cpus": 0.5, "autoscaling": {"min_replicas": REPLICAS, "max_replicas": REPLICAS}}
        with serving(Path(temporary), model_dir, model) as endpoint:
            found, recovered = asyncio.run(measure(endpoint.url, count))
    rows: list[dict[str, Any]] = []
    for streaming, outcomes in found.items():
        lost = [outcome for outcome in outcomes if not outcome.finished]
        rows.append(
            {
                "requests": "streamed" if streaming else "not streamed",
                "all": len(outcomes),
                "answered": len(outcomes) - len(lost),
                "ended with an error event": sum(outcome.status == 200 for outcome in lost),
                "not answered": sum(outcome.status != 200 for outcome in lost),
                "errors": str(dict(Counter(f"{outcome.status} {outcome.error}" for outcome in lost))),
                "longest s": max(outcome.total_s for outcome in outcomes),
            }
        )
    everything = found[True] + found[False]
    silent = [o for o in found[True] if o.status == 200 and not o.finished and o.error != "replica_lost"]
    bars = [
        Bar("kills", len(recovered) + 1, "==", count),
        Bar("longest_s", max(outcome.total_s for outcome in everything), "<=", DEADLINE_S + SLACK_S),
        Bar("unstarted_and_not_answered", sum(outcome.status != 200 for outcome in everything), "==", 0),
        Bar("whole_answers_missing", sum(not outcome.finished for outcome in found[False]), "==", 0),
        Bar("streams_cut_without_an_error", len(silent), "==", 0),
    ]
    if recovered:
        rows.append(
            dict.fromkeys(rows[0], "") | {"requests": "longest until the successor ran", "longest s": max(recovered)}
        )
    return report("replica_kill", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
