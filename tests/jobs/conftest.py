"""One head for all tests about jobs, with one CPU; the working tree and the environment of who submits."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.head import CONFIG, SCRIPT, Head, start_head, wait_until_up


@pytest.fixture(scope="package")
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
