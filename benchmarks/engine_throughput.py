"""Output tokens a second of the default engine and its peers, in process, at 1, 8 and 32 requests at once.

Every engine runs greedily on all cores in a process of its own, one after another, and the rounds are repeated: what
else the machine does then meets all of them. The peers are vLLM, where it is installed (for this Python, or for the one
that --vllm-python names), and transformers' own continuous batching, which is what `transformers serve` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

TOPICS = ["rivers", "clocks", "bread", "bridges", "stars", "forests", "engines", "music"]
MARK = "measured: "
LONGEST_S = 900


def prompts(count: int) -> list[str]:
    """Different beginnings of about 20 tokens, so that no engine can share them."""
    return [f"{number} things that everybody should know about {TOPICS[number % 8]} are" for number in range(count)]


def ours(model: str, clients: int, tokens: int) -> tuple[int, float]:
    from raymodels.config import EngineConfig
    from raymodels.serve.engine import GenerateRequest, Sampling
    from raymodels.serve.transformers_engine import TransformersEngine

    engine = TransformersEngine(model, EngineConfig(), threads=os.cpu_count() or 1)

    async def ask(id: str, prompt: list[int]) -> int:
        request = GenerateRequest(id, prompt, tokens, sampling=Sampling(temperature=0))
        return [delta.generated async for delta in engine.generate(request)][-1]

    async def together(kind: str) -> int:
        encoded = [engine.text.encode(f"{kind} {prompt}") for prompt in prompts(clients)]
        return sum(await asyncio.gather(*(ask(str(at), prompt) for at, prompt in enumerate(encoded))))

    asyncio.run(together("Warm-up:"))
    start = time.perf_counter()
    generated = asyncio.run(together("Now:"))
    return generated, time.perf_counter() - start


def vllm(model: str, clients: int, tokens: int) -> tuple[int, float]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2048, disable_log_stats=True)
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    engine.generate([f"Warm-up: {prompt}" for prompt in prompts(clients)], sampling, use_tqdm=False)
    start = time.perf_counter()
    found = engine.generate([f"Now: {prompt}" for prompt in prompts(clients)], sampling, use_tqdm=False)
    return sum(len(each.outputs[0].token_ids) for each in found), time.perf_counter() - start


def transformers(model: str, clients: int, tokens: int) -> tuple[int, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    end = tokenizer.eos_token_id
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512, use_cuda_graph=False)

    def together(kind: str) -> int:
        inputs = [tokenizer(f"{kind} {prompt}").input_ids for prompt in prompts(clients)]
        found = loaded.generate_batch(
            inputs, generation_config=generation, continuous_batching_config=batching, progress_bar=False
        )
        return sum(len(each.generated_tokens) for each in found.values())

    together("Warm-up:")
    start = time.perf_counter()
    return together("Now:"), time.perf_counter() - start


ENGINES = {"raymodels": ours, "vLLM": vllm, "transformers": transformers}


def measure(python: str, engine: str, model: str, clients: int, tokens: int) -> float:
    """Tokens a second, by a process of its own. It and what it has started are ended as soon as it has told."""
    command = [python, "-m", "benchmarks.engine_throughput", "--worker", engine, model, str(clients), str(tokens)]
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        watchdog = threading.Timer(LONGEST_S, os.killpg, (worker.pid, signal.SIGKILL))
        watchdog.start()
        try:
            assert worker.stdout
            for line in worker.stdout:
                if line.startswith(MARK):
                    return float(line.removeprefix(MARK))
        finally:
            watchdog.cancel()
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # engines have processes of their own
            worker.communicate()
        errors.seek(0)
        sys.exit(f"{engine} failed, or took over {LONGEST_S} s:\n{errors.read()[-4000:]}")


def has_vllm(python: str) -> bool:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", check], check=False).returncode == 0


def main() -> int:
    from benchmarks.report import Bar, report
    from benchmarks.smollm2 import smollm2

    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="8 clients, one round, 16 tokens, no vLLM")
    parser.add_argument("--model", help="a model's directory; default: SmolLM2-135M")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    asked = parser.parse_args()
    clients, rounds, tokens = ([8], 1, 16) if asked.quick else ([1, 8, 32], 3, 64)
    pythons = {"raymodels": sys.executable, "transformers": sys.executable}
    if not asked.quick and has_vllm(asked.vllm_python):
        pythons["vLLM"] = asked.vllm_python
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or str(smollm2(Path(folder)))
        speeds: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for count in clients:
                for engine, python in pythons.items():
                    speeds.setdefault((engine, count), []).append(measure(python, engine, model, count, tokens))
    rows: list[dict[str, Any]] = [
        {"clients": count, **{engine: median(speeds[engine, count]) for engine in pythons}} for count in clients
    ]
    most = rows[-1]
    bars = [Bar(f"of_transformers_at_{clients[-1]}", most["raymodels"] / most["transformers"], ">=", 1.5)]
    if "vLLM" in pythons:
        bars += [Bar(f"of_vllm_at_{row['clients']}", row["raymodels"] / row["vLLM"], ">=", 0.8) for row in rows]
    return report("engine_throughput", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, place, count, new = sys.argv[2:]
        total, seconds = ENGINES[name](place, int(count), int(new))
        print(f"{MARK}{total / seconds}", flush=True)
    else:
        sys.exit(main())
