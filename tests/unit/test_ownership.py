"""Who may train into a run directory, and what becomes of owners that died."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from raymodels import storage
from raymodels.errors import RunInUse, StorageError
from raymodels.train import ownership
from raymodels.train.ownership import Owner

FILE = "owner/00000001.json"


def recorded(place: str) -> dict[str, Any]:
    """The newest owner's file."""
    name = storage.list_names(f"{place}/owner")[-1]
    found: dict[str, Any] = storage.read_json(f"{place}/owner/{name}")
    return found


def claim(place: str, **changes: Any) -> None:
    """Leave the file of an owner on another host, some of its fields replaced."""
    owner = {"host": "elsewhere", "pid": 1, "born": 0.0, "since": 1_700_000_000.0, "seen": time.time()}
    storage.write_json(f"{place}/{FILE}", {**owner, "released": False, **changes})


def test_owns_from_entering_to_leaving(place: str) -> None:
    with Owner(place):
        assert recorded(place)["pid"] == os.getpid()
        assert not recorded(place)["released"]
    assert recorded(place)["released"]
    with Owner(place):
        assert not recorded(place)["released"]


def test_an_error_releases_too(place: str) -> None:
    with pytest.raises(ValueError, match="mine"), Owner(place):
        raise ValueError("mine")
    assert recorded(place)["released"]


def test_the_second_is_told_of_the_first(place: str) -> None:
    with Owner(place):
        since = time.strftime("%Y-%m-%d", time.localtime())
        expected = rf"{place} is being trained by process {os.getpid()} on {socket.gethostname()} since {since} .*:"
        with pytest.raises(RunInUse, match=expected), Owner(place):
            pass
        assert not recorded(place)["released"]  # the second has not touched it


def test_one_of_several_at_once_wins(place: str) -> None:
    count = 6
    begin, end = threading.Barrier(count), threading.Barrier(count)

    def own(_: int) -> bool:
        begin.wait()
        try:
            with Owner(place):
                end.wait()
        except RunInUse:
            end.wait()
            return False
        return True

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(own, range(count))) == 1


def _own_for_ever(place: str, ready: Connection) -> None:
    with Owner(place):
        ready.send(None)
        time.sleep(600)


def test_a_killed_owner_of_this_host_is_gone_at_once(tmp_path: Path) -> None:
    place, context = str(tmp_path), multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    owner = context.Process(target=_own_for_ever, args=(place, writer), daemon=True)
    owner.start()
    assert owner.pid
    reader.recv()
    with pytest.raises(RunInUse, match=f"by process {owner.pid} on"), Owner(place):
        pass
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped by its parent
    with Owner(place):
        assert recorded(place)["pid"] == os.getpid()
    owner.join()
    reader.close()
    writer.close()


def test_what_a_write_cut_short_has_left_is_ignored(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/owner/.00000001.json.0123456789abcdef", b"{")
    with Owner(str(tmp_path)):
        pass
    with Owner(str(tmp_path)):
        pass
    assert storage.exists(f"{tmp_path}/owner/00000002.json")


def test_a_process_that_has_taken_over_the_number_is_another(tmp_path: Path) -> None:
    claim(str(tmp_path), host=socket.gethostname(), pid=1, born=12345.0)
    with Owner(str(tmp_path)):
        pass


def test_a_process_that_has_taken_over_the_number_may_be_this_one(tmp_path: Path) -> None:
    """In a container every driver is process 1, also the one that is started after a kill -9."""
    claim(str(tmp_path), host=socket.gethostname(), pid=os.getpid(), born=0.0)
    with Owner(str(tmp_path)):
        assert recorded(str(tmp_path))["born"] > 0


def test_a_clock_that_is_set_makes_no_owner_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Owner(str(tmp_path)):
        begun = psutil.boot_time()
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: begun + 30)  # as the kernel reckons it
        with pytest.raises(RunInUse, match=f"by process {os.getpid()} on"), Owner(str(tmp_path)):
            pass


def test_who_created_the_file_owns_the_run_though_the_answer_was_lost(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of NFS or S3 that hears nothing asks again, and is told that the name is taken: by itself."""
    create = storage.create

    def asked_twice(uri: str, data: bytes) -> None:
        create(uri, data)
        create(uri, data)

    monkeypatch.setattr(storage, "create", asked_twice)
    with Owner(place), pytest.raises(RunInUse), Owner(place):
        pass
    assert recorded(place)["released"]


def test_an_owner_on_another_host_counts_until_it_has_been_silent(tmp_path: Path) -> None:
    claim(str(tmp_path))
    with pytest.raises(RunInUse, match=r"process 1 on elsewhere since 2023-11-1"), Owner(str(tmp_path)):
        pass
    claim(str(tmp_path), seen=time.time() - ownership.SILENT_SECONDS - 1)
    with Owner(str(tmp_path)):
        assert recorded(str(tmp_path))["host"] == socket.gethostname()


def test_an_owner_refreshes_its_file_also_after_storage_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "REFRESH_SECONDS", 0.02)
    place = str(tmp_path / "run")

    def wait_for_a_refresh() -> None:
        seen, deadline = recorded(place)["seen"], time.monotonic() + 20
        while recorded(place)["seen"] == seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def lead_to(target: Path) -> None:
        """From one moment to the next, as the refreshing thread looks at any."""
        (tmp_path / "link").symlink_to(target)
        (tmp_path / "link").replace(tmp_path / "run" / "owner")

    for folder in ("run", "folder"):
        (tmp_path / folder).mkdir()
    lead_to(tmp_path / "folder")
    with Owner(place):
        wait_for_a_refresh()
        (tmp_path / "file").write_text("a file in its place lets nobody write")
        lead_to(tmp_path / "file")
        with pytest.raises(StorageError):
            storage.write_bytes(f"{place}/{FILE}", b"")
        time.sleep(0.1)
        lead_to(tmp_path / "folder")
        wait_for_a_refresh()
    assert recorded(place)["released"]


def test_an_owner_that_comes_back_to_find_a_successor_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "REFRESH_SECONDS", 0.02)
    told = threading.Event()
    with Owner(str(tmp_path), told.set) as owner:
        assert not told.wait(0.1)
        successor = {**recorded(str(tmp_path)), "host": "elsewhere", "pid": 7}
        storage.write_json(f"{tmp_path}/owner/00000002.json", successor)
        assert told.wait(20)
        assert "by process 7 on elsewhere" in str(owner.replaced())
    assert recorded(str(tmp_path)) == successor


def test_an_owner_whose_folder_was_deleted_writes_its_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "REFRESH_SECONDS", 0.001)
    with Owner(str(tmp_path)):
        for _ in range(100):
            (tmp_path / "owner").rename(tmp_path / "gone")
            shutil.rmtree(tmp_path / "gone")
            deadline = time.monotonic() + 20
            while not (tmp_path / FILE).exists():
                assert time.monotonic() < deadline
