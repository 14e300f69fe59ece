"""Where a driver's events go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from raymodels import storage
from raymodels.errors import StorageError, TrainingError
from raymodels.journal import FILE, read
from raymodels.train import board
from raymodels.train.events import Events

STARTED = {"kind": "started", "attempt": 1, "resumed_from_step": 0, "steps": 10}


def report(step: int) -> dict[str, Any]:
    return {"kind": "report", "step": step, "loss": 1.0 / step, "memory_bytes": [5, 6], "seconds": {}}


def charted(folder: Path) -> dict[str, list[int]]:
    """Scalar -> steps, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[int]] = {}
    for file in sorted(folder.iterdir()):
        accumulator = EventAccumulator(str(file)).Reload()
        for name in accumulator.Tags()["scalars"]:
            found.setdefault(name, []).extend(scalar.step for scalar in accumulator.Scalars(name))
    return found


def test_an_event_goes_to_the_record_the_board_and_the_listener(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with Events(str(tmp_path), heard.append) as events:
        events(STARTED)
        for step in (5, 10):
            events(report(step))
        assert (events.attempt, events.account.step) == (1, 10)
        events({"kind": "finished"})
    assert read(str(tmp_path)).events == heard and all("time" in event for event in heard)
    assert charted(tmp_path / "tensorboard") == {
        "loss": [5, 10],
        "memory_bytes/rank0": [5, 10],
        "memory_bytes/rank1": [5, 10],
    }


def test_on_an_object_store_charts_are_uploaded_in_files(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "ROLL_SECONDS", 0.0)
    with Events(f"{bucket}/run", None) as events:
        events(STARTED)
        for step in (5, 6, 7):
            events(report(step))
        assert len(storage.list_names(f"{bucket}/run/tensorboard")) == 3  # one a report
    for name in storage.list_names(f"{bucket}/run/tensorboard"):
        storage.copy_file(f"{bucket}/run/tensorboard/{name}", str(tmp_path / "copied" / name))
    assert sorted(charted(tmp_path / "copied")["loss"]) == [5, 6, 7]
    assert [event["kind"] for event in read(f"{bucket}/run").events] == ["started", "report", "report", "report"]


def test_charts_that_storage_refuses_end_no_training_and_are_uploaded_later(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "ROLL_SECONDS", 0.0)
    run, heard = f"{bucket}-not-yet/run", list[dict[str, Any]]()
    fs, path = storage.filesystem(f"{bucket}-not-yet")
    fs.mkdir(path)
    with Events(run, heard.append) as events:
        events(report(5))
        fs.rm(path, recursive=True)
        events(report(6))
        events(report(7))
        fs.mkdir(path)
        events(report(8))
    assert [event["step"] for event in heard if event["kind"] == "report"] == [5, 6, 7, 8]
    assert sum("TensorBoard's charts" in event.get("text", "") for event in heard) == 1
    for name in storage.list_names(f"{run}/tensorboard"):
        storage.copy_file(f"{run}/tensorboard/{name}", str(tmp_path / name))
    assert sorted(charted(tmp_path)["loss"]) == [6, 7, 8]  # the first went with the bucket


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_full_disk_ends_no_training(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    others = {*threading.enumerate()}
    with Events(str(tmp_path), heard.append) as events:
        events(report(5))
        [file] = (tmp_path / "tensorboard").iterdir()
        file.unlink()
        file.symlink_to("/dev/full")
        events(report(6))
        with pytest.raises(OSError, match="No space left"):
            events._board._writer.flush()  # so that its thread has come upon it
        for thread in {*threading.enumerate()} - others:
            thread.join(10)  # else the next test would be told of its end
        events(report(7))
        events(report(8))
    assert [event["step"] for event in heard if event["kind"] == "report"] == [5, 6, 7, 8]
    assert sum("No space left" in event.get("text", "") for event in heard) == 1
    file.unlink()
    assert charted(tmp_path / "tensorboard")["loss"] == [8]


def test_another_driver_knows_what_came_before(tmp_path: Path) -> None:
    with pytest.raises(TrainingError), Events(str(tmp_path), None) as events:
        events(STARTED)
        events(report(5))
        raise TrainingError("rank 1 failed: it broke")
    with Events(str(tmp_path), None) as events:
        assert events.attempt == 1
        events(STARTED | {"attempt": 2, "resumed_from_step": 5})
        account = events.account
    assert account.restarts == 1 and account.attempts[0].cause == "TrainingError: rank 1 failed: it broke"


def test_a_failure_is_recorded_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Events(str(tmp_path), None) as events:
        events(STARTED)
        events({"kind": "failed", "attempt": 1, "fault": "lost node", "retry": True})
        events(STARTED | {"attempt": 2})
        raise KeyboardInterrupt
    with pytest.raises(TrainingError), Events(str(tmp_path), None) as events:
        events(STARTED | {"attempt": 3})
        events({"kind": "failed", "attempt": 3, "fault": "user error", "retry": False})
        raise TrainingError("the same")
    failed = [event for event in read(str(tmp_path)).events if event["kind"] == "failed"]
    assert [(event["driver"], event.get("fault"), event.get("error")) for event in failed] == [
        (1, "lost node", None),
        (1, None, "KeyboardInterrupt"),
        (2, "user error", None),
    ]


def test_training_goes_on_while_storage_fails(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with Events(str(tmp_path), heard.append) as events:
        (tmp_path / FILE).mkdir()  # cannot be appended to
        events(STARTED)
        events(report(1))
        (tmp_path / FILE).rmdir()
        events(report(2))
    assert [event["kind"] for event in heard] == ["notice", "started", "report", "report"]
    assert "training goes on" in heard[0]["text"] and FILE in heard[0]["text"]
    assert read(str(tmp_path)).events == heard[1:]


def test_a_record_that_is_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=FILE), Events(str(tmp_path), None) as events:
        (tmp_path / FILE).mkdir()
        events(STARTED)
    with pytest.raises(TrainingError), Events(str(tmp_path / "other"), None) as events:
        (tmp_path / "other" / FILE).mkdir()
        raise TrainingError("which hides no storage error, nor is hidden by one")


def test_events_come_from_any_thread(tmp_path: Path) -> None:
    with Events(str(tmp_path), None) as events:

        def speak(speaker: int) -> None:
            for number in range(50):
                events({"kind": "notice", "speaker": speaker, "number": number})

        threads = [threading.Thread(target=speak, args=(speaker,)) for speaker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read(str(tmp_path))
    assert found.damaged == []
    for speaker in range(4):
        assert [event["number"] for event in found.events if event["speaker"] == speaker] == list(range(50))
    times = [event["time"] for event in found.events]
    assert times == sorted(times)
