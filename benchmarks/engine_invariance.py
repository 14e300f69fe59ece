"""Greedy text of 64 prompts on SmolLM2-135M: alone, 8 and 32 at once under load, and after their beginnings are known.

Under load: requests come in a random order, and as one ends the next one's prompt is computed beside the others. Half
of the prompts share a beginning of about 100 tokens with seven others.

The bars: no text differs from the one that its prompt has alone, and most prompt tokens were found computed. What vLLM
does is printed beside, without a bar: it does not promise that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.endpoint import tiny_model
from benchmarks.eval_task.items import documented
from benchmarks.report import Bar, report
from benchmarks.smollm2 import smollm2
from raymodels.config import EngineConfig
from raymodels.serve.engine import Engine, GenerateRequest, Sampling
from raymodels.serve.engines import open_engine

PROMPTS, SHARED = 64, 4
"""Half of the prompts have one of so many beginnings."""


def prompts() -> list[str]:
    """Of 10 to about 200 tokens, from the documentation of Python's library."""
    found = random.Random(1).sample(documented(), PROMPTS + SHARED * 4)
    texts = [f"{each['line']}\n\n{each['body']}"[: 40 + 5 * at] for at, each in enumerate(found[:PROMPTS])]
    beginnings = ["\n".join(each["body"] for each in found[PROMPTS + at :: SHARED]) for at in range(SHARED)]
    return [f"{beginnings[at % SHARED]}\n\n{text}" if at % 2 else text for at, text in enumerate(texts)]


async def answer(engine: Engine, asked: list[str], width: int, max_tokens: int) -> list[str]:
    """The text of every prompt, ``width`` requests at once."""
    places, found = asyncio.Semaphore(width), [""] * len(asked)

    async def ask(at: int, prompt: str) -> None:
        async with places:
            request = GenerateRequest(str(at), engine.text.encode(prompt), max_tokens, sampling=Sampling(temperature=0))
            async for delta in engine.generate(request):
                found[at] += delta.text

    order = random.Random(width).sample(list(enumerate(asked)), len(asked))
    await asyncio.gather(*(ask(at, prompt) for at, prompt in order))
    return found


def measure(engine: Engine, asked: list[str], width: int, max_tokens: int) -> tuple[list[str], float]:
    start = time.perf_counter()
    return asyncio.run(answer(engine, asked, width, max_tokens)), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--model", help="a model's directory; default: SmolLM2-135M")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    asked, rows = parser.parse_args(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = asked.model or str(tiny_model(place) if asked.quick else smollm2(place))
        threads = os.cpu_count() or 1
        forgetful = open_engine(model, EngineConfig(kind=asked.engine, prefix_cache=0), threads)
        alone, seconds = measure(forgetful, prompts(), 1, asked.max_tokens)
        rows.append(row(1, "computed", alone, alone, seconds))
        for width in (8, 32):
            found, seconds = measure(forgetful, prompts(), width, asked.max_tokens)
            rows.append(row(width, "computed", alone, found, seconds))
        forgetful.close()
        engine = open_engine(model, EngineConfig(kind=asked.engine), threads)
        measure(engine, prompts(), 32, asked.max_tokens)
        before = engine.stats()
        for width in (8, 32):
            found, seconds = measure(engine, prompts(), width, asked.max_tokens)
            rows.append(row(width, "reused", alone, found, seconds))
        after = engine.stats()
        engine.close()
    bars = [Bar("distinct_texts", len(set(alone)), ">=", PROMPTS // 2)]
    if asked.engine == "transformers":
        hits = (after.prefix_hits - before.prefix_hits) / (after.prefix_queries - before.prefix_queries)
        bars.append(Bar("prefix_hits", hits, ">=", 0.5))
        for each in rows[1:]:
            bars.append(Bar(f"mismatches_{each['requests at once']}_{each['prefix']}", each["different"], "==", 0))
    return report("engine_invariance", rows, bars)


def row(width: int, prefix: str, alone: list[str], found: list[str], seconds: float) -> dict[str, Any]:
    different = sum(a != b for a, b in zip(alone, found, strict=True))
    return {"requests at once": width, "prefix": prefix, "different": different, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
