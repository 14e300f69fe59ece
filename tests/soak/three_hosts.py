"""Three hosts with addresses of their own: train over them, serve from them, call between them; one is cut off twice.

The hosts are network namespaces of this machine (`tests.soak.hosts`): it needs root. A ZeRO-3 run over all three (gloo
over their cables) loses one when its cable is pulled, goes on with two, takes it back, and is stopped some steps later;
another run is left in peace up to the same step. What the first one published is then served by a replica on each host,
and called from the second while the third is cut off once more.

The bars: the finished weights are those of the run in peace, to 1e-5; every request ends within the time that it has;
none fails that was sent after that time had passed since the cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.endpoint import MODEL, Outcome, client, request
from benchmarks.recovery import weights_difference
from benchmarks.report import Bar, report
from raymodels.checkpoint.layout import open_checkpoint
from raymodels.config import Config, load
from raymodels.errors import Stopped
from tests.soak.hosts import RAY_PORT, Host, missing, network, ray_cluster, signal_inside
from tests.soak.size import add_size

ROOT = Path(__file__).parents[2]
CLI = str(Path(sys.executable).parent / "raymodels")
HTTP_PORT = 8000
DEADLINE_S = 30.0
SLACK_S = 5.0
PER_S = 4
LONGEST_S = 600.0
FOR_EVER = 100_000  # steps: a host takes the time that it takes to come back, whatever a step takes
# How soon a cluster believes that a host is gone; Ray's own defaults take about a minute.
NOTICE = {f"RAY_health_check_{name}": value for name, value in {"period_ms": "1000", "timeout_ms": "3000"}.items()}
Event = dict[str, Any]


def overrides(folder: Path, name: str, steps: int) -> list[str]:
    stdlib = sysconfig.get_path("stdlib")
    return [
        *[
            f"run.name={name}",
            f"run.storage={folder}",
            f"data.prepared={folder}/prepared",
            f"registry={folder}/registry",
        ],
        *[f"data.source={stdlib}/asyncio/*.py", "data.eval_fraction=0.2", "data.seq_len=64", f"publish.name={name}"],
        *["model.hidden_size=64", "model.layers=2", "model.heads=4", "train.global_batch=6", "train.micro_batch=1"],
        *[
            f"train.steps={steps}",
            "train.schedule=constant",
            "train.lr=1.0e-4",
            "train.report_every=1",
            "checkpoint.every=10",
            f"eval.every={steps}",
            "eval.samples=8",
        ],
        *["zero.stage=3", "workers.count=[2,3]", "workers.resize_after_s=3"],
    ]


class Run:
    """A run on the first host, by the command that a user would type. It publishes by its own name."""

    def __init__(self, host: Host, folder: Path, name: str, steps: int, env: dict[str, str]) -> None:
        settings = overrides(folder, name, steps)
        self.config: Config = load(ROOT / "jobs/configs/demo.yaml", settings)
        self.told = [str(ROOT / "jobs/configs/demo.yaml"), *[x for each in settings for x in ("--set", each)]]
        self.log, self.host, self.env = folder / f"{name}.log", host, env
        self.process = host.start([CLI, "train", *self.told], self.log, env)

    def events(self, kind: str) -> list[Event]:
        try:
            lines = Path(self.config.place, "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["kind"] == kind]

    def until(self, holds: Callable[[Event], bool]) -> Event:
        """The newest report, once it is such a one."""
        deadline = time.monotonic() + LONGEST_S
        while not ((reports := self.events("report")) and holds(reports[-1])):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.config.run.name} ended or hangs:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.2)
        return reports[-1]

    def wait(self, code: int = 0) -> None:
        try:
            ended = self.process.wait(LONGEST_S) == code
        except subprocess.TimeoutExpired:
            ended = False
        if not ended:
            sys.exit(f"{self.config.run.name} failed or hangs:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> None:
        """As Kubernetes does: what it has done is committed."""
        signal_inside(self.process, signal.SIGTERM)
        self.wait(Stopped.exit_code)

    def publish(self) -> None:
        self.process = self.host.start([CLI, "models", "publish", *self.told], self.log, self.env)
        self.wait()


def train_through(hosts: list[Host], folder: Path, steps: int, env: dict[str, str]) -> tuple[list[Event], float]:
    """Rows of what happened, and how far the weights are from those of a run in peace."""
    run, third = Run(hosts[0], folder, MODEL, FOR_EVER, env), hosts[2]
    run.until(lambda report: report["step"] >= steps and report["world_size"] == 3)
    third.cable("down")
    start = time.monotonic()
    run.until(lambda report: report["world_size"] == 2)
    rows = [{"what": "cut off in training", "workers": 2, "seconds": time.monotonic() - start}]
    rows[0]["steps redone"] = redone = steps_redone(run)
    run.until(lambda report: report["step"] >= steps + redone + 10)
    third.cable("up")
    start = time.monotonic()
    back = run.until(lambda report: report["world_size"] == 3)
    rows.append({"what": "back in training", "workers": 3, "seconds": time.monotonic() - start, "steps redone": 0})
    run.until(lambda report: report["step"] >= back["step"] + 10)
    run.stop()
    run.publish()
    peace = Run(hosts[0], folder, "peace", open_checkpoint(run.config.place).step, env)
    peace.wait()
    return rows, weights_difference(run.config, peace.config)


def steps_redone(run: Run) -> int:
    """How many steps those with a worker less did once more."""
    reports = run.events("report")
    first = next(at for at, report in enumerate(reports) if report["world_size"] == 2)
    return int(reports[first - 1]["step"] + 1 - reports[first]["step"])


def serve_through(
    hosts: list[Host], folder: Path, env: dict[str, str]
) -> tuple[list[Event], list[tuple[float, Outcome]], float]:
    """Rows, every request with when it was sent, and when the third host was cut off, in the same seconds."""
    config, log, found = folder / "serve.yaml", folder / "serve.log", folder / "found.json"
    # One replica fits on a host, beside the gateway on the first.
    three = {"min_replicas": 3, "max_replicas": 3, "first_replicas": 3}
    told = {
        "registry": f"{folder}/registry",
        "models": [{"model": MODEL, "cpus": 0.8, "autoscaling": three}],
        "http": {"host": hosts[0].address, "port": HTTP_PORT, "access_log": False},
    }
    config.write_text(json.dumps(told))
    server = hosts[0].start([CLI, "serve", str(config)], log, env)
    wait_for(log, f"http://{hosts[0].address}:{HTTP_PORT}", server)
    command = [
        sys.executable,
        "-m",
        "tests.soak.three_hosts",
        "--call",
        f"http://{hosts[0].address}:{HTTP_PORT}",
        str(found),
    ]
    caller = hosts[1].start(command, folder / "call.log", env)
    time.sleep(15)
    cut = time.time()
    hosts[2].cable("down")
    time.sleep(DEADLINE_S + 15)
    hosts[2].cable("up")
    time.sleep(15)
    signal_inside(caller, signal.SIGTERM)
    if caller.wait(120) != 0:
        sys.exit(f"the caller failed:\n{(folder / 'call.log').read_text()[-4000:]}")
    stop(server)
    outcomes = [(sent, Outcome(**told)) for sent, told in json.loads(found.read_text())]
    rows = []
    for what, since, until in (
        ("before the cut", 0.0, cut - DEADLINE_S),
        ("in flight at the cut, or sent in the 30 s after it", cut - DEADLINE_S, cut + DEADLINE_S),
        ("sent later", cut + DEADLINE_S, math.inf),
    ):
        part = [outcome for sent, outcome in outcomes if since <= sent < until]
        failed = sum(not outcome.finished for outcome in part)
        longest = max((outcome.total_s for outcome in part), default=0.0)
        print(what, Counter(outcome.error or "answered" for outcome in part))
        rows.append({"what": f"requests {what}", "number": len(part), "failed": failed, "longest s": longest})
    return rows, outcomes, cut


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"no {text!r} in:\n{log.read_text()[-6000:]}")
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    signal_inside(process, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


async def call(url: str, found: Path) -> None:
    """Send requests evenly, streamed and not, until told to end; write when each was sent, and how it ended."""
    over, sent = asyncio.Event(), list[tuple[float, asyncio.Task[Outcome]]]()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    headers = {"X-Request-Timeout": str(DEADLINE_S)}
    async with client(url, 2 * DEADLINE_S, headers) as http:
        while not over.is_set():
            fields = {"prompt": f"def main{len(sent)}", "max_tokens": 24, "stream": len(sent) % 2 == 0}
            sent.append((time.time(), asyncio.create_task(request(http, **fields))))
            await asyncio.sleep(1 / PER_S)
        outcomes = [(at, asdict(await task)) for at, task in sent]
    found.write_text(json.dumps(outcomes))


def main() -> int:
    parser = argparse.ArgumentParser()
    add_size(parser, "fewer steps before the cut")
    parser.add_argument("--call", nargs=2, metavar=("URL", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.call:
        asyncio.run(call(asked.call[0], Path(asked.call[1])))
        return 0
    if why := missing():
        print(f"skipped: {why}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with network(3, folder) as hosts:
            env = {
                **NOTICE,
                "RAY_ADDRESS": f"{hosts[0].address}:{RAY_PORT}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": "three-hosts-0123456789abcdef0123456789abcdef",
                "RAY_USAGE_STATS_ENABLED": "0",
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            with ray_cluster(hosts, folder, 1, env):
                steps = 10 if asked.size == "small" else 100  # before the cut
                trained, difference = train_through(hosts, folder, steps, env)
                served, outcomes, cut = serve_through(hosts, folder, env)
    late = [outcome for sent, outcome in outcomes if sent >= cut + DEADLINE_S]
    bars = [
        Bar("weights_difference", difference, "<=", 1e-5),
        Bar("longest_request_s", max(outcome.total_s for _, outcome in outcomes), "<=", DEADLINE_S + SLACK_S),
        Bar("requests_after_the_deadline", len(late), ">=", PER_S * 10),
        Bar("failed_after_the_deadline", sum(not outcome.finished for outcome in late), "==", 0),
    ]
    columns = ("what", "workers", "seconds", "steps redone", "number", "failed", "longest s")
    rows = [{name: row.get(name, "") for name in columns} for row in [*trained, *served]]
    return report("three_hosts", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
