"""The commands about jobs, as processes, on a Ray head that demands a token: exit codes, kills, where the token is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.head import LINES, Head
from tests.jobs.tcp_proxy import TcpProxy

COMMAND = str(Path(sys.executable).parent / "raymodels")


@pytest.fixture
def environment(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With the token in a file, as it should be: what is in it can be looked for everywhere else."""
    file = tmp_path_factory.mktemp("token") / "auth_token"
    file.write_text(head.token)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "RAY_ADDRESS": head.address}


@pytest.fixture
def started(tree: Path, environment: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with process:  # closes its pipes
            process.kill()


def call(tree: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def start(
    started: list[subprocess.Popen[str]], tree: Path, environment: dict[str, str], *arguments: str, until: str
) -> subprocess.Popen[str]:
    """A command whose output has got to a line."""
    process = subprocess.Popen(
        [COMMAND, *arguments], cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started.append(process)
    assert process.stdout
    assert any(line == f"{until}\n" for line in process.stdout), process.stderr and process.stderr.read()
    return process


def submitting(name: str, seed: int) -> list[str]:
    return ["submit", "jobs/configs/my config.yaml", "--id", name, "--set", f"run.seed={seed}"]


def test_success_and_failure(tree: Path, environment: dict[str, str], config: Path) -> None:
    done = call(tree, environment, *submitting("good", 1))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "good  SUCCEEDED"), done.stderr
    done = call(tree, environment, *submitting("bad", 2))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: bad failed with exit code 1: error: seed 2 is no good")
    assert call(tree, environment, *submitting("bad", 2)).returncode == 1, "said again, not run again"
    assert call(tree, environment, "status", "good").returncode == 0
    assert call(tree, environment, "status", "bad").returncode == 1
    done = call(tree, environment, "status", "nobody")
    assert done.returncode == 2
    assert "has no job nobody" in done.stderr
    assert "no newline at the end" in call(tree, environment, "logs", "good").stdout
    states = {job["submission_id"]: job for job in json.loads(call(tree, environment, "list", "--json").stdout)}
    assert (states["good"]["exit_code"], states["bad"]["exit_code"]) == (0, 1)


def test_a_killed_submit_is_repeated(
    tree: Path, environment: dict[str, str], config: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start(started, tree, environment, *submitting("counting", 4), until="line 5")
    process.kill()
    process.wait()
    done = call(tree, environment, *submitting("counting", 4))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "counting  SUCCEEDED"), done.stderr
    assert "counting is RUNNING already; this attaches to it" in done.stderr
    counted = [line for line in done.stdout.splitlines() if line.startswith("line ")]
    assert counted == [f"line {number}" for number in range(LINES)]


def test_ctrl_c_leaves_the_job_and_stop_ends_it(
    tree: Path, environment: dict[str, str], config: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start(started, tree, environment, *submitting("long", 3), until="sleeping")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "long goes on without you; stop it with: raymodels stop long --address" in said
    assert "\tRUNNING\t" in call(tree, environment, "status", "long").stdout
    again = start(started, tree, environment, *submitting("long", 3), until="sleeping")
    assert "\tSTOPPED\t" in call(tree, environment, "stop", "long").stdout
    _, said = again.communicate(timeout=30)
    assert (again.returncode, said.splitlines()[-1]) == (143, "error: long was stopped")
    assert call(tree, environment, "status", "long").returncode == 143


def test_a_stopped_job_has_time_to_leave(
    tree: Path, environment: dict[str, str], config: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start(started, tree, environment, *submitting("polite", 5), until="waiting")
    assert call(tree, environment, "stop", "polite").returncode == 0
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert shown.splitlines()[-1] == "left in peace"


def test_a_job_that_waits_for_resources(tree: Path, environment: dict[str, str], config: Path) -> None:
    done = call(tree, environment, *submitting("greedy", 1), "--no-wait", "--entrypoint-resource", "moon=1")
    assert (done.returncode, done.stdout) == (0, "greedy  PENDING\n"), done.stderr
    assert "\tPENDING\t" in call(tree, environment, "stop", "greedy").stdout


def test_the_token_is_nowhere(
    tree: Path, environment: dict[str, str], config: Path, head: Head, started: list[subprocess.Popen[str]]
) -> None:
    process = start(started, tree, environment, *submitting("secret", 3), until="sleeping")
    command_lines = {
        path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)
    }
    assert any(b"--id\0secret" in line for line in command_lines.values())
    assert not [path for path, line in command_lines.items() if head.token.encode() in line]
    described = call(tree, environment, "status", "secret", "--json")
    listed = call(tree, environment, "list", "--json")
    stopped = call(tree, environment, "stop", "secret")
    said = "".join(process.communicate(timeout=30))
    wrong = call(tree, environment | {"RAY_AUTH_TOKEN": "not-the-token"}, "status", "secret")
    assert wrong.returncode == 2
    assert "not-the-token" not in wrong.stdout + wrong.stderr
    for done in (described, listed, stopped):
        said += done.stdout + done.stderr
    assert "secret" in said
    assert head.token not in said
    logs = [path for path in head.folder.glob("session_latest/logs/**/*") if path.is_file()]
    assert any(path.name == "job-driver-secret.log" for path in logs)
    assert not [path for path in logs if head.token.encode() in path.read_bytes()]


def test_a_lost_cluster(tree: Path, environment: dict[str, str], config: Path, head: Head) -> None:
    proxy = TcpProxy(int(head.address.rpartition(":")[2]))
    there = environment | {"RAY_ADDRESS": f"http://127.0.0.1:{proxy.port}"}
    process = subprocess.Popen(
        [COMMAND, *submitting("away", 3), "--lost-after", "1"],
        cwd=tree,
        env=there,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert any(line == "sleeping\n" for line in process.stdout)
    proxy.cut()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "away may still run: the same submit again, or raymodels logs away --follow" in said.splitlines()[-1]
    assert "\tRUNNING\t" in call(tree, environment, "status", "away").stdout
    assert "\tSTOPPED\t" in call(tree, environment, "stop", "away").stdout
