"""Events on a disk and on a real S3 server, with drivers that are killed and storage that fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raymodels import storage
from raymodels.errors import StorageError
from raymodels.journal import FILE, FOLDER, FULL, Journal, read
from raymodels.ledger import account

pytestmark = pytest.mark.slow


def event(number: int, text: str = "") -> dict[str, Any]:
    return {"time": 1000.0 + number, "kind": "notice", "number": number, "text": text}


def test_what_is_appended_is_read_over_several_drivers(place: str) -> None:
    assert read(place).events == []
    for driver in range(3):
        writer = Journal(place)
        for number in range(4):
            writer.append(event(4 * driver + number))
    assert read(place).events == [event(number) for number in range(12)]
    assert read(place).damaged == []


def test_on_a_disk_it_is_one_file_of_lines(tmp_path: Path) -> None:
    writer = Journal(str(tmp_path))
    writer.append(event(1))
    writer.append(event(2))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_text().count("\n") == 2


def test_on_an_object_store_each_event_rewrites_little(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    for name in ("create", "write_bytes"):
        put = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda uri, data, put=put: (written.append(len(data)), put(uri, data)))
    writer, count = Journal(f"{bucket}/run"), 60
    for number in range(count):
        writer.append(event(number, "." * 3000))
    assert len(written) == count and max(written) <= FULL
    sizes = storage.walk(f"{bucket}/run/{FOLDER}")
    assert list(sizes) == [f"{number:06}.jsonl" for number in range(1, len(sizes) + 1)]
    assert len(sizes) == -(-count // (FULL // 3100))
    assert [found["number"] for found in read(f"{bucket}/run").events] == list(range(count))


def test_an_event_larger_than_an_object_gets_its_own(bucket: str) -> None:
    writer = Journal(bucket)
    for number in range(3):
        writer.append(event(number, "." * 2 * FULL))
    assert len(storage.list_names(f"{bucket}/{FOLDER}")) == 3
    assert len(read(bucket).events) == 3


def test_a_driver_that_was_killed_while_appending(tmp_path: Path) -> None:
    run = str(tmp_path)
    Journal(run).append(event(1))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": 1002.0, "ki')
    assert read(run).events == [event(1)] and read(run).damaged == []
    writer = Journal(run)
    writer.append(event(3))
    writer.append(event(4))
    assert read(run).events == [event(1), event(3), event(4)]
    assert read(run).damaged == [f'{run}/{FILE} line 2: not JSON, or cut off: {{"time": 1002.0, "ki']


@pytest.mark.parametrize(
    "line", ["[]", '{"kind": "notice"}', '{"time": 3}', '{"time": "now", "kind": "x"}', "\x00\x00"]
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    Journal(str(tmp_path)).append(event(1))
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    found = read(str(tmp_path))
    assert found.events == [event(1)]
    [damaged] = found.damaged
    assert damaged.startswith(f"{tmp_path}/{FILE} line 2: no")


def test_events_wait_for_storage_that_fails(tmp_path: Path) -> None:
    writer = Journal(str(tmp_path))
    writer.append(event(1))
    (tmp_path / FILE).rename(tmp_path / "away")
    (tmp_path / FILE).mkdir()  # cannot be appended to
    for number in (2, 3):
        with pytest.raises(StorageError, match=FILE):
            writer.append(event(number))
    (tmp_path / FILE).rmdir()
    (tmp_path / "away").rename(tmp_path / FILE)
    writer.flush()
    writer.append(event(4))
    assert read(str(tmp_path)).events == [event(number) for number in range(1, 5)]


def test_a_bucket_that_vanishes_and_comes_back(bucket: str) -> None:
    writer, gone = Journal(f"{bucket}-not-yet/run"), f"{bucket}-not-yet"
    with pytest.raises(StorageError):
        writer.append(event(1))
    fs, path = storage.filesystem(gone)
    fs.mkdir(path)
    writer.append(event(2))
    assert read(f"{gone}/run").events == [event(1), event(2)]


DRIVER = """
import sys, time
from raymodels.journal import Journal

place, attempt, resumed, ending = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
journal = Journal(place)

def tell(**event):
    journal.append({"time": time.time(), "driver": attempt, **event})

last = time.perf_counter()
tell(kind="started", attempt=attempt, resumed_from_step=resumed, steps=100)
for done in range(resumed + 1, resumed + 6):
    seconds = {}
    for kind in ("data", "step", "evaluation"):
        begin = time.perf_counter()
        time.sleep(0.05)
        seconds[kind] = time.perf_counter() - begin
    now = time.perf_counter()
    seconds["other"] = now - last - sum(seconds.values())
    last = now
    tell(kind="report", step=done, seconds=seconds)
if ending != "killed":
    tell(kind=ending, attempt=attempt)
print("now", flush=True)
if ending == "killed":
    time.sleep(60)
"""


def test_real_drivers_with_three_restarts_account_for_every_second(tmp_path: Path) -> None:
    """Processes that time themselves, two of them killed, against a clock outside of them."""
    resumed = [0, 3, 8, 9]
    for attempt, ending in enumerate(["killed", "failed", "killed", "finished"], start=1):
        command = [sys.executable, "-c", DRIVER, str(tmp_path), str(attempt), str(resumed[attempt - 1]), ending]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
            assert driver.stdout and driver.stdout.readline() == b"now\n"
            ended = time.time()
            if ending == "killed":
                driver.send_signal(signal.SIGKILL)
            driver.wait()
    events = read(str(tmp_path)).events
    found = account(events)
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
    assert found.error <= 0.01 * found.wall
    assert found.wall == pytest.approx(ended - events[0]["time"], abs=1)
    assert [attempt.ending for attempt in found.attempts] == ["killed", "failed", "killed", "finished"]
    assert found.step == 14
    reports = [event for event in events if event["kind"] == "report"]
    lasting = [each for each in reports if each["step"] <= [*resumed[1:], 14][each["driver"] - 1]]
    assert (len(reports), len(lasting)) == (20, 14)  # six steps were done twice
    assert found.seconds["step"] == pytest.approx(sum(each["seconds"]["step"] for each in lasting), rel=0.01)
