"""Jobs submitted to a Ray head of this test's own, which demands a token."""

import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
from ray.job_submission import JobSubmissionClient

from raymodels.errors import ClusterError, ClusterLost, ConfigError, JobError, JobStopped
from raymodels.submit import Submission, connect, job_state, list_jobs, stop, submit
from tests.cluster.tcp_proxy import TcpProxy

# Ray's own client passes this to aiohttp.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")

CONFIG = """
run: {name: tiny}
data: {source: python-stdlib, seq_len: 16}
model: {arch: llama, hidden_size: 16, layers: 1, heads: 2}
train: {steps: 1, global_batch: 1, micro_batch: 1, lr: 1.0e-3}
workers: {count: 1}
"""
CUT_S = float(os.environ.get("CUT_S", "8"))
"""How long the network is cut in mid-log; the claim is for 30 s."""
LINES = round((CUT_S + 10) * 10)
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
        time.sleep(5)
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


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets need a short path
        process, address = start_head(token, folder)
        head = Head(address, token, Path(folder))
        try:
            wait_until_up(process, head)
            yield head
        finally:
            process.send_signal(signal.SIGTERM)  # with --block it takes everything it started along
            try:
                process.wait(30)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "jobs/configs").mkdir(parents=True)
    (tmp_path / "jobs/train.py").write_text(SCRIPT)
    (tmp_path / "jobs/configs/my config.yaml").write_text(CONFIG)
    for left_out in (".git/config", "runs/tiny/weights", ".venv/python", "jobs/__pycache__/train.pyc"):
        (tmp_path / left_out).parent.mkdir(parents=True)
        (tmp_path / left_out).write_text("x")
    return tmp_path


@pytest.fixture
def config(tree: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return tree / "jobs/configs/my config.yaml"


def test_a_job_that_succeeds(head: Head, tree: Path, config: Path) -> None:
    lines: list[str] = []
    result = submit(config, address=head.address, working_dir=tree, overrides=["run.name=x"], follow=lines.append)
    assert result.status == "SUCCEEDED"
    assert any("run.storage ./runs is relative" in line for line in lines)
    assert lines[-3:] == [
        "files jobs/configs/my config.yaml jobs/train.py",
        "arguments jobs/configs/my config.yaml --set run.name=x",
        "no newline at the end",
    ]


def test_a_job_that_fails(head: Head, tree: Path, config: Path) -> None:
    with pytest.raises(JobError, match="exit code 1: error: seed 2 is no good") as caught:
        submit(config, address=head.address, working_dir=tree, overrides=["run.seed=2"])
    assert "\n" not in str(caught.value)


def test_a_job_that_is_stopped(head: Head, tree: Path, config: Path) -> None:
    jobs = JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {head.token}"})

    def stop_when_it_sleeps(line: str) -> None:
        if line == "sleeping":
            [running] = [job for job in jobs.list_jobs() if job.status == "RUNNING"]
            assert running.submission_id
            jobs.stop_job(running.submission_id)

    with pytest.raises(JobStopped, match="was stopped"):
        submit(config, address=head.address, working_dir=tree, overrides=["run.seed=3"], follow=stop_when_it_sleeps)


def test_the_same_command_is_one_job(head: Head, tree: Path, config: Path) -> None:
    def call(again: bool = False, wait: bool = True) -> tuple[str, list[str], list[str]]:
        lines: list[str] = []
        notices: list[str] = []
        result = submit(
            config,
            address=head.address,
            working_dir=tree,
            overrides=["run.name=once"],
            submission=Submission(again=again),
            wait=wait,
            follow=lines.append,
            notice=notices.append,
        )
        return result.submission_id, lines, notices

    first, nothing, _ = call(wait=False)
    assert first.startswith("train-my-config-")
    assert nothing == []
    second, lines, notices = call()
    assert second == first
    assert any("this attaches to it" in notice or "is over: SUCCEEDED" in notice for notice in notices)
    assert lines[-1] == "no newline at the end"
    third, same_lines, notices = call()
    assert (third, same_lines) == (first, lines)
    assert any("is over: SUCCEEDED" in notice and "--again" in notice for notice in notices)
    assert call(again=True)[0] == f"{first}.2"
    assert call()[0] == f"{first}.2"
    (tree / "new file").write_text("x")
    assert call(wait=False)[0] not in (first, f"{first}.2")


def test_an_id_that_another_job_has(head: Head, tree: Path, config: Path) -> None:
    def call(*overrides: str) -> str:
        asked = Submission(id="mine")
        return submit(
            config, address=head.address, working_dir=tree, overrides=overrides, submission=asked, wait=False
        ).submission_id

    assert call("run.name=a") == "mine"
    with pytest.raises(ConfigError, match=r"--id mine is taken by another job, mine .*run.name=a"):
        call("run.name=b")
    with pytest.raises(ConfigError, match=r"--id 'a b': give letters"):
        submit(config, address=head.address, working_dir=tree, submission=Submission(id="a b"))


def test_the_entrypoints_resources_are_reserved(head: Head, tree: Path, config: Path) -> None:
    asked = Submission(id="reserving", cpus=0.5, memory=1000)
    submit(config, address=head.address, working_dir=tree, submission=asked)
    headers = {"Authorization": f"Bearer {head.token}"}
    answer = httpx.get(f"{head.address}/api/v0/actors?detail=true&limit=1000", headers=headers).json()
    [supervisor] = [actor for actor in answer["data"]["result"]["result"] if actor["name"].endswith("_reserving")]
    assert supervisor["required_resources"] == {"CPU": 0.5, "memory": 1000.0}


def test_the_network_is_cut_in_mid_log(head: Head, tree: Path, config: Path) -> None:
    proxy = TcpProxy(int(head.address.rpartition(":")[2]))
    lines: list[str] = []
    notices: list[str] = []

    def cut_at_the_tenth(line: str) -> None:
        lines.append(line)
        if line == "line 10":
            proxy.cut()
            threading.Timer(CUT_S, proxy.mend).start()

    result = submit(
        config,
        address=f"http://127.0.0.1:{proxy.port}",
        working_dir=tree,
        overrides=["run.seed=4"],
        follow=cut_at_the_tenth,
        notice=notices.append,
    )
    assert result.status == "SUCCEEDED"
    assert result.seconds > CUT_S
    assert [line for line in lines if line.startswith("line ")] == [f"line {number}" for number in range(LINES)]
    assert lines[-1] == "no newline at the end"
    assert any("does not answer" in notice for notice in notices)
    assert any("answers again" in notice for notice in notices)


def test_a_cluster_that_is_lost(head: Head, tree: Path, config: Path) -> None:
    proxy = TcpProxy(int(head.address.rpartition(":")[2]))
    asked = Submission(id="left-behind")
    with pytest.raises(ClusterLost, match=r"left-behind may still run: .*raymodels logs left-behind --follow"):
        submit(
            config,
            address=f"http://127.0.0.1:{proxy.port}",
            working_dir=tree,
            overrides=["run.seed=3"],
            submission=asked,
            follow=lambda line: proxy.cut() if line == "sleeping" else None,
            lost_after_s=2,
        )
    cluster = connect(head.address)
    assert job_state(cluster, "left-behind").status == "RUNNING"
    assert stop(cluster, "left-behind").status == "STOPPED"
    assert "left-behind" in {state.submission_id for state in list_jobs(cluster)}


def test_https_with_a_ca_of_ones_own(head: Head, tree: Path, config: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    proxy = TcpProxy(int(head.address.rpartition(":")[2]), context)
    ca = tmp_path / ".git/ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    lines: list[str] = []
    address = f"https://127.0.0.1:{proxy.port}"
    submit(config, address=address, ca=ca, working_dir=tree, overrides=["run.name=tls"], follow=lines.append)
    assert lines[-1] == "no newline at the end"
    with pytest.raises(ClusterError, match=r"certificate of https://.* is not to be trusted .*--ca"):
        connect(address)


@pytest.mark.parametrize("token", ["wrong", None])
def test_a_refused_token(
    head: Head, tree: Path, config: Path, token: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError, match=r"refused the token.*RAY_AUTH_TOKEN"):
        submit(config, address=head.address, working_dir=tree)


def test_a_token_in_a_file(
    head: Head, tree: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(head.token + "\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert submit(config, address=head.address, working_dir=tree, wait=False).submission_id


def test_an_address_where_nothing_is(tree: Path, config: Path) -> None:
    [port] = free_ports(1)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at http://127.0.0.1:{port}"):
        submit(config, address=f"127.0.0.1:{port}", working_dir=tree)


def test_an_address_that_the_environment_overrides(
    head: Head, tree: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        submit(config, address=head.address, working_dir=tree)


@pytest.mark.parametrize(
    "job, overrides, message",
    [
        ("train", ["train.stepz=1"], "train.stepz: unknown key; did you mean steps"),
        ("evaluate", [], "has no jobs/evaluate.py"),
    ],
)
def test_what_is_wrong_here_is_not_submitted(
    tree: Path, config: Path, job: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        submit(config, address="http://127.0.0.1:1", working_dir=tree, job=job, overrides=overrides)  # type: ignore[arg-type]


def test_a_config_outside_the_working_tree(tree: Path, config: Path) -> None:
    with pytest.raises(ConfigError, match="lies outside working_dir"):
        submit(config, address="http://127.0.0.1:1", working_dir=tree / "jobs/__pycache__")
