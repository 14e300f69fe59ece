"""An engine in a Ray that `connect` starts, with a busy process of somebody else's on every core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, json, multiprocessing, os, statistics, sys, time
import ray
from raymodels import cluster
from raymodels.config import EngineConfig

class Served:
    def __init__(self, folder):
        from raymodels.serve.transformers_engine import TransformersEngine
        self.engine = TransformersEngine(folder, EngineConfig(max_batch=2, kv_memory=1 << 24))

    async def first_tokens(self, label, times):
        from raymodels.serve.engine import GenerateRequest
        found = []
        for number in range(times):
            began = time.perf_counter()
            request = GenerateRequest(f"{label}-{number}", [5 + number] * 100, max_tokens=1)
            async for _ in self.engine.generate(request):
                break
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def niceness(self):
        return os.getpriority(os.PRIO_PROCESS, 0)

def busy():
    while True:
        pass

if __name__ == "__main__":
    cluster.connect()
    served = ray.remote(Served).remote(sys.argv[1])
    alone = ray.get(served.first_tokens.remote("alone", 9))
    busy = [multiprocessing.Process(target=busy, daemon=True) for _ in range(os.cpu_count())]
    for process in busy:
        process.start()
    beside = ray.get(served.first_tokens.remote("beside", 9))
    for process in busy:
        process.kill()
    print(json.dumps({"niceness": ray.get(served.niceness.remote()), "alone": alone, "beside": beside}))
"""


def test_the_first_token_does_not_wait_for_foreign_processes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """At Ray's own niceness, and the engine's on top of it, it takes a hundred times as long."""
    script = tmp_path / "served.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model_dir)],
        env=environment | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["niceness"] == 0
    assert found["beside"] < 15 * found["alone"], found
