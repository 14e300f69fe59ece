"""The endpoint with vLLM as its engine, beside vLLM's own server: output tokens a second at 1, 8 and 32 clients.

Both are up all the time, in processes of their own, and are loaded in turns. Run it with a Python that has vLLM. The
bar: 0.95 of what `vllm serve` gives, at each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import httpx

from benchmarks.endpoint import MODEL, serving
from benchmarks.report import Bar, report
from benchmarks.serve_overhead import LOADS, THREADS, There, rate
from benchmarks.smollm2 import smollm2

CONTEXT = 2048
START_S = 300
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@contextmanager
def vllm_server(model_dir: Path) -> Iterator[str]:
    """The URL of a `vllm serve` with the settings that our engine gives vLLM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len {CONTEXT} --max-num-seqs 32"
    options += f" --enforce-eager --served-model-name {MODEL} --disable-log-stats --disable-uvicorn-access-log"
    # What `vllm serve` runs. The command itself asks for the metadata of a package vllm, which vllm-cpu does not have.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), *options.split()]
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"vllm serve did not start in {START_S} s, or ended: {server.poll()}")
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its engine is a process of its own
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


async def measure(urls: dict[str, str], rounds: int) -> dict[int, dict[str, float]]:
    """Clients -> tokens a second of each server; medians of rounds in turns."""
    servers = {name: There(url) for name, url in urls.items()}
    found = {}
    for clients, each in LOADS:
        for server in servers.values():
            await rate(server.ask, clients, 1)
        turns = [
            {name: await rate(server.ask, clients, each) for name, server in servers.items()} for _ in range(rounds)
        ]
        found[clients] = {name: median(turn[name] for turn in turns) for name in servers}
    for server in servers.values():
        await server.http.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--model", type=Path, help="a model's directory; default: SmolLM2-135M")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = asked.model or smollm2(Path(temporary) / "smollm2")
        engine = {"kind": "vllm", "threads": THREADS, "max_context": CONTEXT, "kv_memory": "2GiB"}
        model = {"cpus": 1, "engine": engine}
        with vllm_server(model_dir) as bare, serving(Path(temporary), model_dir, model) as endpoint:
            speeds = asyncio.run(measure({"vllm serve": bare, "raymodels": endpoint.url}, 1 if asked.quick else 3))
    rows = [
        {"clients": clients, **speed, "ratio": speed["raymodels"] / speed["vllm serve"]}
        for clients, speed in speeds.items()
    ]
    return report(
        "vllm_serve", rows, [Bar(f"of_vllm_serve_at_{row['clients']}", row["ratio"], ">=", 0.95) for row in rows]
    )


if __name__ == "__main__":
    sys.exit(main())
