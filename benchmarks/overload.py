"""One key asks for five times what the model can do: what another key notices of it.

The quiet key sends requests at a quarter of the model's rate, alone and then beside the loud key, in turns. A third key
sends one request of 25 texts to embed after the other, of more sequences than the model takes at once: beside the loud
key alone, so that the two figures of the quiet one stay comparable.

The bars: the quiet key's p99 under overload at most 2 x its own without; no status but 200, 429 and 503; whatever was
accepted is answered to its end; the quiet key is never refused; and every request of 25 texts is answered, the slowest
within 2 x what its work takes at its fair share (alone, x 2) and the time that a sequence of another may hold a place.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.endpoint import MODEL, Outcome, client, request, serving, tiny_model
from benchmarks.report import Bar, quick, report
from raymodels.serve.tenants import add_key

BATCH = 8
FIELDS: dict[str, Any] = {"prompt": "def main", "max_tokens": 64, "logit_bias": {"0": -100}}
TEXTS = [f"def text_{number}(self): return {number}" for number in range(25)]
GIVE_UP_S, PAUSE_S = 20, 0.2
ALLOWED = {200, 429, 503}


def tenant(url: str, key: str) -> aiohttp.ClientSession:
    return client(url, timeout_s=120, headers={"Authorization": f"Bearer {key}"})


async def at_rate(http: aiohttp.ClientSession, per_s: float, seconds: float) -> list[Outcome]:
    """Send requests evenly, whether or not earlier ones have been answered; their outcomes once all have."""
    sent, start = list[asyncio.Task[Outcome]](), time.perf_counter()
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(start + number / per_s - time.perf_counter())
        sent.append(asyncio.create_task(request(http, **FIELDS)))
    return await asyncio.gather(*sent)


async def rate(http: aiohttp.ClientSession, seconds: float) -> float:
    """Requests a second of as many clients as the model decodes together."""
    start, done = time.perf_counter(), 0

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() < start + seconds:
            outcome = await request(http, **FIELDS)
            done += outcome.finished

    await asyncio.gather(*(ask() for _ in range(BATCH)))
    return done / (time.perf_counter() - start)


async def embed(http: aiohttp.ClientSession, seconds: float) -> list[Outcome]:
    """Requests of 25 texts one after the other, with a pause between them; their outcomes."""
    outcomes, end = list[Outcome](), time.perf_counter() + seconds
    body, headers = {"model": MODEL, "input": TEXTS}, {"X-Request-Timeout": str(GIVE_UP_S)}
    while time.perf_counter() < end:
        start = time.perf_counter()
        async with http.post("/v1/embeddings", json=body, headers=headers) as answer:
            found = await answer.json()
        finished = answer.status == 200 and len(found["data"]) == len(TEXTS)
        outcomes.append(Outcome(answer.status, finished, total_s=time.perf_counter() - start))
        await asyncio.sleep(PAUSE_S)
    return outcomes


async def measure(url: str, keys: list[str], rounds: int, seconds: float) -> tuple[float, Any]:
    """The model's rate, and outcomes of the quiet key and of the one of many texts, alone and beside the loud key."""
    alone, beside, loud = list[Outcome](), list[Outcome](), list[Outcome]()
    few, many = list[Outcome](), list[Outcome]()
    quiet_key, loud_key, many_key = keys
    async with (
        tenant(url, quiet_key) as quiet_http,
        tenant(url, loud_key) as loud_http,
        tenant(url, many_key) as many_http,
    ):
        await rate(loud_http, seconds / 4)
        full = await rate(loud_http, seconds / 2)
        for _ in range(rounds):
            alone += await at_rate(quiet_http, full / 4, seconds)
            ours, theirs = await asyncio.gather(
                at_rate(quiet_http, full / 4, seconds), at_rate(loud_http, 5 * full, seconds)
            )
            beside, loud = beside + ours, loud + theirs
            few += await embed(many_http, seconds / 4)
            ours, theirs = await asyncio.gather(embed(many_http, seconds), at_rate(loud_http, 5 * full, seconds))
            many, loud = many + ours, loud + theirs
    texts = {"25 texts, alone": few, "25 texts, beside the loud one": many}
    return full, {"quiet, alone": alone, "quiet, beside the loud one": beside, **texts, "loud": loud}


def p99_s(outcomes: list[Outcome]) -> float:
    taken = sorted(outcome.total_s for outcome in outcomes if outcome.finished)
    return taken[int(0.99 * (len(taken) - 1))] if taken else float("inf")


def main() -> int:
    rounds, seconds = (1, 20) if quick() else (4, 30)
    with tempfile.TemporaryDirectory() as temporary:
        keys = str(Path(temporary) / "keys.yaml")
        tenants = [add_key(keys, name) for name in ("quiet", "loud", "many")]
        model_dir = tiny_model(Path(temporary) / "model", 512, 8)
        model = {"cpus": 0.5, "engine": {"max_batch": BATCH, "max_queue": 4 * BATCH}}
        with serving(Path(temporary), model_dir, model, {"keys_file": keys}) as endpoint:
            full, found = asyncio.run(measure(endpoint.url, tenants, rounds, seconds))
    rows = []
    for name, outcomes in found.items():
        statuses = Counter(outcome.status for outcome in outcomes)
        rows.append(
            {
                "key": name,
                "requests": len(outcomes),
                "answered": sum(outcome.finished for outcome in outcomes),
                "429 and 503": statuses[429] + statuses[503],
                "p50 s": sorted(outcome.total_s for outcome in outcomes)[len(outcomes) // 2],
                "p99 s of answered": p99_s(outcomes),
                "slowest s": max(outcome.total_s for outcome in outcomes),
            }
        )
    everything = [outcome for outcomes in found.values() for outcome in outcomes]
    refused = [outcome for name, outcomes in found.items() if name.startswith("quiet") for outcome in outcomes]
    many = found["25 texts, beside the loud one"]
    fair_s = 2 * max(outcome.total_s for outcome in found["25 texts, alone"]) + BATCH / full
    bars = [
        Bar("p99_ratio", p99_s(found["quiet, beside the loud one"]) / p99_s(found["quiet, alone"]), "<=", 2),
        Bar("other_statuses", sum(outcome.status not in ALLOWED for outcome in everything), "==", 0),
        Bar("lost_after_acceptance", sum(o.status == 200 and not o.finished for o in everything), "==", 0),
        Bar("quiet_refused", sum(outcome.status != 200 for outcome in refused), "==", 0),
        Bar("25_texts_unanswered", sum(not outcome.finished for outcome in many), "==", 0),
        Bar("25_texts_slowest_to_fair", max(outcome.total_s for outcome in many) / fair_s, "<=", 2),
        Bar("loud_refused_share", sum(o.status != 200 for o in found["loud"]) / len(found["loud"]), ">=", 0.5),
    ]
    return report("overload", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
