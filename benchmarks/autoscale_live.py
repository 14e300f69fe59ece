"""The autoscaler on a live Ray Serve: a step load from zero replicas, kept up for minutes, and what follows its end.

Requests that come before any replica runs are held. The bars: the first decision within 5 s; every request answered,
held or not, and every stream whole; at most one reversal under the steady load; no replica left some time after it.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray import serve

from benchmarks.endpoint import APPLICATION, Outcome, client, request, serving, tiny_model
from benchmarks.report import Bar, quick, report

CLIENTS = 6
SCALING = {
    "min_replicas": 0,
    "max_replicas": 4,
    "target_ongoing_requests": 3,
    "upscale_delay_s": 5,
    "downscale_delay_s": 120,
    "idle_s": 20,
    "start_up_s": 20,
}
MODEL = {"cpus": 0.2, "engine": {"max_batch": 4, "threads": 1}, "autoscaling": SCALING}


class Watch:
    """Follows the number of replicas that were ordered: those that start, run, or were never asked to stop."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, int]] = []
        """(seconds on the monotonic clock, ordered, running), whenever it changed."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self._over.wait(0.2):
            states = serve.status().applications[APPLICATION].deployments[APPLICATION].replica_states
            running, starting = states.get("RUNNING", 0), states.get("STARTING", 0) + states.get("UPDATING", 0)
            if not self.seen or self.seen[-1][1:] != (running + starting, running):
                self.seen.append((time.monotonic(), running + starting, running))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def ordered_since(self, begin: float, end: float) -> list[int]:
        return [ordered for at, ordered, _ in self.seen if begin <= at <= end]


def reversals(numbers: list[int]) -> int:
    """How often a series turns from rising to falling or back."""
    steps = [b > a for a, b in pairwise(numbers) if a != b]
    return sum(a != b for a, b in pairwise(steps))


async def load(url: str, seconds: float) -> list[list[Outcome]]:
    """By client. They ask again as soon as they are answered; half of them stream."""
    end = time.monotonic() + seconds

    async def ask(number: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        async with client(url, timeout_s=300) as http:
            while time.monotonic() < end:
                fields: dict[str, Any] = {"prompt": f"def f{number}", "max_tokens": 64, "stream": number % 2 == 0}
                outcomes.append(await request(http, **fields))
        return outcomes

    return await asyncio.gather(*(ask(number) for number in range(CLIENTS)))


def main() -> int:
    seconds = 60.0 if quick() else 180.0
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model")
        with serving(Path(folder), model, MODEL) as endpoint, Watch() as watch:
            while not watch.seen or watch.seen[-1][1]:  # a deployment may begin with a replica
                time.sleep(0.5)
            begin = time.monotonic()
            by_client = asyncio.run(load(endpoint.url, seconds))
            end, emptied = time.monotonic(), float("inf")
            while time.monotonic() < end + 300:
                if watch.seen[-1][1] == 0:
                    emptied = watch.seen[-1][0] - end
                    break
                time.sleep(0.5)
    first = next((at - begin for at, ordered, _ in watch.seen if at >= begin and ordered), float("inf"))
    answering = next((at - begin for at, _, running in watch.seen if at >= begin and running), float("inf"))
    steady = watch.ordered_since(begin, end)
    outcomes = [outcome for own in by_client for outcome in own]
    failed = [outcome for outcome in outcomes if outcome.status != 200 or not outcome.finished]
    for outcome in failed[:5]:
        print(f"failed: {outcome}")
    print("replicas ordered:", " ".join(f"{at - begin:.0f}s:{ordered}" for at, ordered, _ in watch.seen))
    rows = [
        {"what": "from the first request to the first decision, s", "value": first},
        {"what": "to the first replica that runs, s", "value": answering},
        {"what": "most replicas", "value": max(steady, default=0)},
        {"what": "requests answered", "value": len(outcomes) - len(failed)},
        {"what": "from the last answer to no replica, s", "value": emptied},
    ]
    bars = [
        Bar("seconds_to_first_decision", first, "<=", 5.0),
        Bar("requests_failed", len(failed), "==", 0),
        # Each client's first one was sent when no replica had been ordered.
        Bar(
            "requests_held_from_zero",
            sum(own[0].finished and own[0].first_s > first for own in by_client),
            "==",
            CLIENTS,
        ),
        Bar("reversals_on_steady_load", reversals(steady), "<=", 1),
        Bar("replicas_in_the_end", watch.seen[-1][1], "==", 0),
    ]
    return report("autoscale_live", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
