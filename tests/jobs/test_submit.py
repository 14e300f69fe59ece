"""Jobs submitted to a Ray head that demands a token."""

import contextlib
import random
import ssl
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import trustme

from raymodels.errors import ClusterError, ConfigError, JobError
from raymodels.submit import Submission, connect, submit
from raymodels.submit.follow import POLL_S
from tests.jobs.head import CUT_S, LINES, Head, free_ports
from tests.jobs.tcp_proxy import TcpProxy

# Ray's own client passes this to aiohttp.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")


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
    with pytest.raises(JobError, match=r"exit code 1: .*error: seed 2 is no good"):
        submit(config, address=head.address, working_dir=tree, overrides=["run.seed=2"], wait=False)


def test_a_job_whose_supervisor_dies(head: Head, tree: Path, config: Path) -> None:
    def kill(line: str) -> None:
        if line == "sleeping":
            [ours] = [each for each in psutil.process_iter() if "ray::JobSupervisor" in command(each) and of_head(each)]
            ours.kill()

    def command(process: psutil.Process) -> str:
        with contextlib.suppress(psutil.Error):
            return " ".join(process.cmdline())
        return ""

    def of_head(process: psutil.Process) -> bool:
        return any(str(head.folder) in command(parent) for parent in process.parents())

    with pytest.raises(JobError, match=r"failed: .*died"):
        submit(config, address=head.address, working_dir=tree, overrides=["run.seed=3"], follow=kill)


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


def test_the_answer_to_a_submit_is_lost(head: Head, tree: Path, config: Path) -> None:
    asked, cut = threading.Event(), threading.Event()

    def request(piece: bytes) -> bool:
        if piece.startswith(b"POST /api/jobs/"):
            asked.set()
        return True

    def answer(piece: bytes) -> bool:
        if asked.is_set() and not cut.is_set():
            cut.set()
            proxy.cut()
            threading.Timer(3, proxy.mend).start()
            return False
        return True

    proxy = TcpProxy(int(head.address.rpartition(":")[2]), request=request, answer=answer)
    address, notices = f"http://127.0.0.1:{proxy.port}", list[str]()
    asking = Submission(id="answer-lost")
    result = submit(config, address=address, working_dir=tree, submission=asking, notice=notices.append)
    assert cut.is_set()
    assert (result.submission_id, result.status) == ("answer-lost", "SUCCEEDED")
    assert any("this attaches to it" in notice or "is over" in notice for notice in notices)


def test_a_proxy_without_websockets(head: Head, tree: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymodels.submit.follow.FAILURES", 2)
    proxy = TcpProxy(int(head.address.rpartition(":")[2]), request=lambda piece: b"/logs/tail" not in piece)
    lines, notices, when = list[str](), list[str](), list[float]()

    def follow(line: str) -> None:
        lines.append(line)
        when.append(time.monotonic())

    submit(
        config,
        address=f"http://127.0.0.1:{proxy.port}",
        working_dir=tree,
        overrides=["run.seed=4", "run.name=no-websockets"],
        follow=follow,
        notice=notices.append,
    )
    assert [line for line in lines if line.startswith("line ")] == [f"line {number}" for number in range(LINES)]
    assert sum("no websocket" in notice for notice in notices) == 1
    assert when[-1] - when[0] > POLL_S, "all of it came at the end"


def test_a_slow_upload(head: Head, tree: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["raymodels.submit.connect"], "CONNECT_S", 1.0)
    (tree / "data.bin").write_bytes(random.Random(0).randbytes(15_000_000))
    proxy = TcpProxy(int(head.address.rpartition(":")[2]), upload=5e6)
    result = submit(config, address=f"http://127.0.0.1:{proxy.port}", working_dir=tree)
    assert result.status == "SUCCEEDED"
    assert result.seconds > 2, "the proxy was not slow"


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
