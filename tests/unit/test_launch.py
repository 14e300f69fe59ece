"""What a driver makes of an attempt's end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import WorkerCrashedError

from raymodels import manifest, storage
from raymodels.checkpoint import layout
from raymodels.config import Config
from raymodels.errors import RunInUse, StorageError, TrainingError
from raymodels.train import launch
from raymodels.train.attempt import Evidence
from tests.conftest import altered

pytestmark = pytest.mark.slow


def commit(config: Config, step: int) -> None:
    """A checkpoint with nothing in it but what it says of itself."""
    place = layout.step_place(config.place, step)
    state = layout.State(step, 0, 1, config.zero.stage, config.train.precision, config.digest(), "", {})
    storage.write_bytes(f"{place}/{layout.STATE}", layout.to_json(state))
    manifest.commit(place, manifest.describe(place))


def test_out_of_memory_ends_the_run_with_the_planners_estimate(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU's memory can run out here; what torch raises there is raised in its place."""

    def runs_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(launch, "run_attempt", runs_out)
    config, events = altered(tiny, tmp_path), list[dict[str, Any]]()
    with pytest.raises(TrainingError, match=r"Tried to allocate 2.*train\.micro_batch.*estimate.*GB a worker"):
        launch.train(config, events.append)
    [failed] = [event for event in events if event["kind"] == "failed"]
    assert failed["fault"] == "out_of_memory_device" and not failed["retry"]
    assert "the planner's estimate" in storage.read_bytes(f"{config.place}/log/attempt-1.txt").decode()


def test_an_attempt_that_fails_after_the_last_commit_is_not_followed_by_one_without_steps(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, attempts = altered(tiny, tmp_path), list[int]()

    def killed_at_the_end(config: Config, prepared: str, number: int, *_: Any, **__: Any) -> Any:
        attempts.append(number)
        commit(config, config.train.steps)
        raise WorkerCrashedError

    monkeypatch.setattr(launch, "run_attempt", killed_at_the_end)
    assert launch.train(config).checkpoint.step == config.train.steps
    assert attempts == [1]


def test_an_attempt_that_saves_ends_the_row_of_faults_that_count(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, attempts = altered(tiny, tmp_path, retry={"worker_killed": 1}), list[int]()

    def killed(_: Config, __: str, number: int, ___: Any, ____: Any, evidence: Evidence, *_____: Any) -> Any:
        attempts.append(number)
        evidence.committed = number <= 3
        raise WorkerCrashedError

    monkeypatch.setattr(launch, "run_attempt", killed)
    with pytest.raises(TrainingError, match="died"):
        launch.train(config)
    assert attempts == [1, 2, 3, 4]


def test_storage_that_is_away_between_two_attempts_is_waited_for(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps = altered(tiny, tmp_path), list[int]()
    place, away = Path(layout.step_place(config.place, 2)), tmp_path / "away"

    def comes_back() -> None:
        place.unlink()
        away.rename(place)

    def loses_its_storage(config: Config, prepared: str, number: int, history: Any, *_: Any, **__: Any) -> Any:
        steps.append(history["resumed_from_step"])
        if number == 1:
            commit(config, 2)
            place.rename(away)
            place.symlink_to(place)  # leads nowhere: an error, as of a disk that does not answer
            threading.Timer(1.5, comes_back).start()
            raise StorageError("it went away")
        commit(config, config.train.steps)
        return {"phases": {}}

    monkeypatch.setattr(launch, "run_attempt", loses_its_storage)
    launch.train(config)
    assert steps == [0, 2]


def test_a_driver_that_was_replaced_leaves_the_saves_of_its_successor_alone(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = altered(tiny, tmp_path)
    under_way = layout.step_place(config.place, 3)

    def cut_off(config: Config, *_: Any, **__: Any) -> Any:
        successor = storage.read_json(f"{config.place}/owner/00000001.json") | {"host": "elsewhere", "pid": 7}
        storage.write_json(f"{config.place}/owner/00000002.json", successor)
        storage.write_bytes(f"{under_way}/zero/part", b"half")
        raise WorkerCrashedError

    monkeypatch.setattr(launch, "run_attempt", cut_off)
    with pytest.raises(RunInUse, match="process 7 on elsewhere"):
        launch.train(config)
    assert storage.exists(f"{under_way}/zero/part")
