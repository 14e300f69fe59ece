"""The whole line as a user runs it, by command: train, serve, call; interrupted; submitted to a cluster."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from raymodels import manifest
from raymodels.checkpoint import layout
from raymodels.config import dump
from tests.conftest import altered
from tests.jobs.head import Head, free_ports, start_head, wait_until_up
from tests.processes import descendants

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).parent / "raymodels")


def raymodels(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def written(folder: Path, name: str, content: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def line(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Train with one command, serve with another: what the first printed, and where the second listens."""
    folder = tmp_path_factory.mktemp("line")
    config = altered(tiny, folder, registry=str(folder / "registry"), publish={"name": "tiny", "alias": "prod"})
    trained = raymodels("train", written(folder, "train.yaml", dump(config)), "--json")
    assert trained.returncode == 0, trained.stderr
    [port] = free_ports(1)
    serving = {"registry": config.registry, "models": [{"model": "tiny@prod", "cpus": 1}], "http": {"port": port}}
    log = folder / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [COMMAND, "serve", written(folder, "serve.yaml", serving)], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 240
        while "serving tiny" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield {
            **json.loads(trained.stdout),
            "url": f"http://127.0.0.1:{port}",
            "registry": config.registry,
        }
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 130


def test_train_prints_where_everything_lies(line: dict[str, Any]) -> None:
    assert line["version"] == "tiny@1"
    assert layout.open_checkpoint(line["run"]).place == line["checkpoint"]
    assert line["eval_loss"] > 0


def test_models_are_listed_and_shown(line: dict[str, Any]) -> None:
    [row] = json.loads(raymodels("models", "list", "--registry", line["registry"], "--json").stdout)
    assert (row["version"], row["aliases"], row["step"]) == ("tiny@1", "prod", 4)
    card = json.loads(raymodels("models", "show", "tiny@prod", "--registry", line["registry"], "--verify").stdout)
    assert card["checkpoint"] == line["checkpoint"]


def test_complete_streams_what_the_endpoint_answers(line: dict[str, Any]) -> None:
    arguments = ["complete", "the model", "--max-tokens", "12", "--url", line["url"]]
    streamed = raymodels(*arguments)
    whole = json.loads(raymodels(*arguments, "--json").stdout)
    assert streamed.returncode == 0
    assert streamed.stdout.removesuffix("\n") == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] <= 12


def test_chat_without_a_template_is_a_reason_and_exit_code_2(line: dict[str, Any]) -> None:
    answer = raymodels("chat", "hello", "--url", line["url"])
    assert answer.returncode == 2
    assert "chat template" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_the_endpoint_is_healthy_and_counts(line: dict[str, Any]) -> None:
    for route in ("/healthz", "/readyz"):
        assert httpx.get(line["url"] + route).status_code == 200
    assert "raymodels_serve_requests_total" in httpx.get(line["url"] + "/metrics").text


def reported(log: Path) -> list[int]:
    """The steps that a run has told of."""
    return [int(step) for step in re.findall(r"step (\d+)/5000", log.read_text())]


def train_until(path: str, log: Path, step: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a run of 5000 steps; returns once it has told of a step."""
    with log.open("w") as errors:
        run = subprocess.Popen([COMMAND, "train", path, *options], stderr=errors)
    deadline = time.monotonic() + 240
    while max(reported(log), default=0) < step:
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return run


def test_sigterm_saves_and_leaves_and_the_next_start_goes_on_from_there_until_ctrl_c(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, train={"steps": 5000, "report_every": 10}, checkpoint={"every": 5000})
    path, first, second = written(tmp_path, "train.yaml", dump(config)), tmp_path / "first", tmp_path / "second"
    run = train_until(path, first, 20)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 143, first.read_text()
    newest = layout.latest(config.place)
    assert newest and newest.step >= 20
    assert f"after step {newest.step}, which is committed" in first.read_text()

    run = train_until(path, second, newest.step + 10, "--set", "checkpoint.every=5")  # and so in the midst of saves
    assert min(reported(second)) > newest.step
    started = psutil.Process(run.pid).children(recursive=True)
    assert descendants(psutil.Process(run.pid), "RayTrainWorker")
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130
    assert "Traceback" not in second.read_text()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    last = layout.latest(config.place)
    assert last and last.step > newest.step
    manifest.verify(last.place)
    shown = raymodels("runs", "show", "tiny", "--storage", config.run.storage)
    assert shown.returncode == 0, shown.stderr


@pytest.fixture
def head() -> Iterator[Head]:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        process, address = start_head(token, folder, cpus=2)
        try:
            wait_until_up(process, Head(address, token))
            yield Head(address, token)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_submit_runs_the_demo_on_a_cluster_and_exits_as_the_job_does(head: Head, tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    small = ["train.steps=4", "train.warmup_steps=1", "model.layers=1", "eval.samples=8"]
    small += [f"data.source={sysconfig.get_path('stdlib')}/asyncio/*.py", "data.eval_fraction=0.2"]
    places = [f"run.storage={tmp_path}/runs", f"data.prepared={tmp_path}/data", f"registry={tmp_path}/registry"]
    overrides = [word for override in small + places for word in ("--set", override)]
    arguments = ["submit", "jobs/configs/demo.yaml", "--address", head.address]
    succeeded = raymodels(*arguments, *overrides, **token)
    assert succeeded.returncode == 0, succeeded.stdout + succeeded.stderr
    assert "SUCCEEDED" in succeeded.stdout
    assert head.token not in succeeded.stdout + succeeded.stderr
    checkpoint = layout.latest(f"{tmp_path}/runs/python-demo")
    assert checkpoint and checkpoint.step == 4
    failed = raymodels(*arguments, *overrides, "--set", "train.lr=2.0e-3", **token)
    assert failed.returncode != 0
    assert "train.lr: 0.001 -> 0.002" in failed.stdout + failed.stderr
