"""A Ray head that demands a token, and a working tree of which jobs are submitted to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

CONFIG = """
run: {name: tiny}
data: {source: python-stdlib, seq_len: 16}
model: {arch: llama, hidden_size: 16, layers: 1, heads: 2}
train: {steps: 1, global_batch: 1, micro_batch: 1, lr: 1.0e-3}
workers: {count: 1}
"""
CUT_S = float(os.environ.get("CUT_S", "5"))
"""How long the network is cut in mid-log; the claim is for 30 s."""
LINES = round((CUT_S + 7) * 10)
SCRIPT = (
    f"LINES = {LINES}"
    + """
import pathlib, signal, sys, time
print("files", *sorted(str(p) for p in pathlib.Path(".").rglob("*") if p.is_file()))
print("arguments", *sys.argv[1:], flush=True)
if "run.seed=2" in sys.argv:
    sys.exit("error: seed 2 is no good")
if "run.seed=3" in sys.argv:
    print("sleeping", flush=True)
    time.sleep(60)
if "run.seed=5" in sys.argv:
    def leave(*_):
        time.sleep(4)  # Ray itself would kill it after 3
        sys.exit("left in peace")
    signal.signal(signal.SIGTERM, leave)
    print("waiting", flush=True)
    time.sleep(60)
if "run.seed=4" in sys.argv:
    for number in range(LINES):
        print("line", number, flush=True)
        time.sleep(0.1)
print("no newline at the end", end="")
"""
)


@dataclass(frozen=True)
class Head:
    address: str
    token: str
    folder: Path = Path()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def start_head(token: str, folder: str, cpus: int = 1) -> tuple[subprocess.Popen[bytes], str]:
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    bin_folder = Path(sys.executable).parent
    process = subprocess.Popen(
        [
            *[str(bin_folder / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"],
            *[f"--{name}={port}" for name, port in ports.items()],
            *["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}", "--object-store-memory=100000000"],
            f"--temp-dir={folder}",
        ],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # as in all tests
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return process, f"http://127.0.0.1:{ports['dashboard-port']}"


def wait_until_up(process: subprocess.Popen[bytes], head: Head) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended early"
        try:
            answer = httpx.get(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return
        time.sleep(0.5)
    raise AssertionError("the head did not come up in 60 s")
