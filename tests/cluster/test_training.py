"""Runs on a real local Ray: to the end, interrupted, repeated, impossible, and from where another run ended."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.config import Config
from raymodels.errors import ClusterError, ConfigError, RaymodelsError, RunInUse
from raymodels.registry import Registry
from tests.conftest import altered

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def finished(
    tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Any, list[dict[str, Any]]]:
    """A run that was trained and published: its config, result and events."""
    from raymodels.train.launch import train

    folder = tmp_path_factory.mktemp("finished")
    config = altered(tiny, folder, registry=str(folder / "registry"), publish={"name": "tiny", "alias": "prod"})
    events: list[dict[str, Any]] = []
    return config, train(config, events.append), events


def test_a_run_ends_with_a_checkpoint_a_version_and_its_record(finished: Any) -> None:
    config, result, events = finished
    assert result.checkpoint.step == config.train.steps
    assert result.version.reference == "tiny@1"
    assert result.version.card["step"] == config.train.steps
    assert result.version.card["data_fingerprint"] == result.prepared.fingerprint
    assert result.version.card["metrics"]["eval_loss"] == result.metrics["eval_loss"]
    assert Registry(config.registry).resolve("tiny@prod").number == 1
    assert list(result.phases) == ["worker_start", "imports", "data", "model", "engine", "restore", "first_step"]
    steps = [event["step"] for event in events if event["kind"] == "report"]
    assert steps == [1, 2, 3, 4]
    assert all(len(event["memory_bytes"]) == 2 for event in events if event["kind"] == "report")
    recorded = [json.loads(line) for line in storage.read_bytes(f"{result.place}/events.jsonl").splitlines()]
    assert recorded == [event for event in events if event["kind"] != "preparing"]
    kinds = [event["kind"] for event in recorded if event["kind"] != "report"]
    assert kinds == ["prepared", "started", "saved", "saved", "finished"]
    assert storage.list_names(f"{result.place}/tensorboard")


def test_a_finished_run_is_not_run_again(finished: Any) -> None:
    from raymodels.train.launch import train

    config, result, _ = finished
    events: list[dict[str, Any]] = []
    again = train(config, events.append)
    assert again.version == result.version
    assert again.metrics == result.metrics
    assert not [event for event in events if event["kind"] in ("started", "report")]


def test_another_config_under_the_same_name_is_refused_with_the_difference(finished: Any) -> None:
    from raymodels.train.launch import train

    config, _, _ = finished
    other = config.model_copy(update={"train": config.train.model_copy(update={"lr": 5e-3})})
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.01 -> 0\.005.*run\.name"):
        train(other)


def test_evaluation_gives_the_held_out_loss_of_the_run(finished: Any) -> None:
    from raymodels.train.launch import evaluate

    config, result, _ = finished
    assert evaluate(config) == {"step": 4, "eval_loss": pytest.approx(result.metrics["eval_loss"], abs=1e-6)}


def test_a_run_starts_from_a_version_pinned_to_its_number(finished: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    from raymodels.train.launch import train

    config, first, _ = finished
    raw = {**tiny, "model": {"from": "registry:tiny@prod"}, "data": {**tiny["data"], "tokenizer": None}}
    second = train(altered(raw, tmp_path, registry=config.registry, train={"lr": 1e-5, "warmup_steps": 0}))
    assert "from: registry:tiny@1" in storage.read_bytes(f"{second.place}/config.yaml").decode()
    assert second.metrics["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=0.05)


def test_a_run_goes_on_with_another_number_of_workers_and_stage(finished: Any, tiny: dict[str, Any]) -> None:
    from raymodels.train.launch import train

    config, result, _ = finished
    other = altered(tiny, Path(config.run.storage), workers={"count": 1}, zero={"stage": 3}, registry=config.registry)
    again = train(other)
    assert again.checkpoint == result.checkpoint


def test_a_bug_is_not_tried_again(tiny: dict[str, Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    from raymodels.train.launch import train

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"no model")
    config = altered({**tiny, "model": {"from": str(broken)}}, tmp_path)
    events: list[dict[str, Any]] = []
    with pytest.raises(RaymodelsError):
        train(config, events.append)
    [failed] = [event for event in events if event["kind"] == "failed"]
    assert not failed["retry"]


def test_a_second_driver_is_refused_with_the_first_ones_process(tiny: dict[str, Any], tmp_path: Path) -> None:
    from raymodels.train.launch import train
    from raymodels.train.ownership import Owner

    config = altered(tiny, tmp_path)
    with Owner(config.place), pytest.raises(RunInUse, match=rf"process {os.getpid()} on .*run\.name"):
        train(config)


def test_workers_that_never_fit_are_an_error_after_a_bounded_wait(tiny: dict[str, Any], tmp_path: Path) -> None:
    from raymodels.train.launch import train

    config = altered(tiny, tmp_path, workers={"count": 8, "start_timeout_s": 2})
    events: list[dict[str, Any]] = []
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"room for 4 of 8 workers.*4 CPU.*workers\.count"):
        train(config, events.append)
    assert time.monotonic() - began < 15
    assert [event for event in events if event["kind"] == "notice"]
    assert layout.latest(config.place) is None
