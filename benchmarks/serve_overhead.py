"""What HTTP costs: time to first token and tokens a second of an endpoint, beside the same engine called in process.

All figures of a path are taken in turns: the engine here, the endpoint, and a bare round trip, which is a FastAPI
deployment of one line behind Ray Serve's proxy.

The bars, of the path that `deploy` takes by itself: the whole HTTP path adds at most one bare round trip and 3 ms to
the time to first token (p50, 1 client); the endpoint reaches 0.95 of the engine's tokens a second with 1 and 8 clients,
and 0.90 with 32; and the pieces of a stream come at most 200 ms and the engine's longest step apart (p99).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI
from ray import serve

from benchmarks.endpoint import client, proxy_url, request, serving, tiny_model
from benchmarks.report import Bar, report
from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.engine import GenerateRequest, Sampling
from raymodels.serve.transformers_engine import TransformersEngine

THREADS = 2
TOKENS = 64
PATHS = ("proxy", "direct")
LOADS = ((1, 4), (8, 2), (32, 1))
"""Clients, and how many requests each sends."""
RATIOS = {1: 0.95, 8: 0.95, 32: 0.90}
"""Clients -> the part of the engine's tokens a second that is to be reached."""
GAP_S = 0.2
numbers = itertools.count()
bare = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(bare)
class Bare:
    @bare.post("/bare")
    async def answer(self) -> dict[str, str]:
        return {"answer": "at once"}


def prompt() -> str:
    """One that has not been seen before."""
    return f"{next(numbers)} times I have asked what"


class Here:
    """The engine in this process."""

    def __init__(self, model_dir: Path) -> None:
        self.engine = TransformersEngine(str(model_dir), EngineConfig(), THREADS)
        self.gaps_s: list[float] = []

    async def ask(self, tokens: int) -> tuple[float, int]:
        """Seconds to the first token, and tokens."""
        text, start, first, generated = prompt(), time.perf_counter(), 0.0, 0
        ids, last = self.engine.text.encode(text), 0.0
        async for delta in self.engine.generate(GenerateRequest(text, ids, tokens, sampling=Sampling(temperature=0))):
            now = time.perf_counter()
            first = first or now - start
            self.gaps_s += [now - last] if last else []
            generated, last = delta.generated, now
        return first, generated


class There:
    """The endpoint."""

    def __init__(self, url: str) -> None:
        self.http = client(url, timeout_s=300)
        self.gaps_s: list[float] = []

    async def ask(self, tokens: int) -> tuple[float, int]:
        outcome = await request(self.http, prompt=prompt(), max_tokens=tokens, temperature=0, stream=True)
        assert outcome.finished, outcome
        self.gaps_s += outcome.gaps_s
        return outcome.first_s, outcome.tokens


async def rate(ask: Callable[[int], Awaitable[tuple[float, int]]], clients: int, each: int) -> float:
    """Tokens a second of so many clients, each with so many requests one after the other."""

    async def one_after_another() -> int:
        return sum([(await ask(TOKENS))[1] for _ in range(each)])

    start = time.perf_counter()
    generated = sum(await asyncio.gather(*(one_after_another() for _ in range(clients))))
    return generated / (time.perf_counter() - start)


async def firsts(here: Here, there: There, bare_url: str, times: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of the engine and the endpoint, and of bare round trips, in turns."""
    found: dict[str, list[float]] = {"engine": [], "endpoint": [], "bare": []}
    async with aiohttp.ClientSession() as http:
        for number in range(times + 5):
            engine, endpoint = (await here.ask(2))[0], (await there.ask(2))[0]
            start = time.perf_counter()
            async with http.post(bare_url, raise_for_status=True) as answer:
                await answer.read()
            round_trip = time.perf_counter() - start
            if number >= 5:
                for name, seconds in zip(found, (engine, endpoint, round_trip), strict=True):
                    found[name].append(1000 * seconds)
    return found


@dataclass
class Speed:
    """Tokens a second of the engine and of the endpoint, and seconds between what a stream gets of each."""

    engine: float
    endpoint: float
    longest_step_s: float
    gap_s: float
    """99 % are shorter."""


async def rates(here: Here, there: There, clients: int, each: int, rounds: int) -> Speed:
    """Medians of the tokens a second of rounds in turns, and all their gaps."""
    pairs = []
    for _ in range(rounds + 1):
        pairs.append((await rate(here.ask, clients, each), await rate(there.ask, clients, each)))
        if len(pairs) == 1:  # the first round makes room and opens connections
            here.gaps_s, there.gaps_s = [], []
    engine, endpoint = (statistics.median(side) for side in zip(*pairs[1:], strict=True))
    return Speed(engine, endpoint, max(here.gaps_s), statistics.quantiles(there.gaps_s, n=100)[-1])


async def measure(
    here: Here, url: str, bare_url: str, times: int, rounds: int
) -> tuple[dict[str, float], dict[int, Speed]]:
    """Of one path: the medians of the times to first token; clients -> the speed of the engine and the endpoint."""
    there = There(url)
    first = {name: statistics.median(values) for name, values in (await firsts(here, there, bare_url, times)).items()}
    loads = LOADS if rounds else ()
    speed = {clients: await rates(here, there, clients, each, rounds) for clients, each in loads}
    await there.http.close()
    return first, speed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tiny model, and less of everything")
    parser.add_argument("--model", type=Path, help="a directory in Hugging Face layout, such as one of SmolLM2-135M")
    args = parser.parse_args()
    times, rounds = (60, 1) if args.quick else (100, 7)  # one round's ratio is off by 3 % at times
    default, rows, bars = HttpConfig().ingress, list[dict[str, Any]](), list[Bar]()
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = args.model or tiny_model(Path(temporary) / "model", *((64, 2) if args.quick else (512, 12)))
        here = Here(model_dir)
        model = {"cpus": 1, "engine": {"threads": THREADS}}
        for path in PATHS:
            with serving(Path(temporary), model_dir, model, {"ingress": path}) as endpoint:
                serve.run(Bare.bind(), name="bare", route_prefix="/bare")  # type: ignore[attr-defined]
                own = rounds if path == default else 0
                bare_url = f"{proxy_url()}/bare/bare"
                first, speed = asyncio.run(measure(here, endpoint.url, bare_url, times, own))
                serve.delete("bare")
            added = first["endpoint"] - first["engine"]
            rows.append({"path": path, "figure": "first token, ms", **first, "added or ratio": added})
            if path == default:
                bars.append(Bar("first_token_added_ms", added, "<=", first["bare"] + 3))
            for clients, found in speed.items():
                ratio = found.endpoint / found.engine
                figures = {"engine": found.engine, "endpoint": found.endpoint, "bare": "", "added or ratio": ratio}
                rows.append({"path": path, "figure": f"tokens/s, {clients} clients", **figures})
                bars.append(Bar(f"tokens_per_s_ratio_{clients}", ratio, ">=", RATIOS[clients]))
                steps, gap = 1000 * found.longest_step_s, 1000 * found.gap_s
                figures = {"engine": steps, "endpoint": gap, "bare": "", "added or ratio": gap - steps}
                rows.append({"path": path, "figure": f"longest step, p99 gap, ms, {clients} clients", **figures})
                bars.append(Bar(f"gap_p99_ms_{clients}", gap, "<=", 1000 * GAP_S + steps))
        here.engine.close()
    return report("serve_overhead", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
