"""Attempts of a run in one controller's process, on a real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from raymodels.train.controller import Kept, Trainer
from tests.processes import descendants


def attempt(kept: Kept, folder: Path, loop: Any) -> None:
    quiet = LoggingConfig(log_level="ERROR")
    run = RunConfig(storage_path=str(folder), failure_config=FailureConfig(max_failures=0), logging_config=quiet)
    Trainer(kept, loop, scaling_config=ScalingConfig(num_workers=1), run_config=run).fit()


def processes(name: str) -> set[int]:
    """Those of this Ray, which this process has started."""
    return {process.pid for process in descendants(psutil.Process(), f"^{name}")}


def test_attempts_share_a_process_and_leave_none(ray_cluster: Any, tmp_path: Path) -> None:
    def well() -> None:
        pass

    def badly() -> None:
        raise ZeroDivisionError("on purpose")

    def kill_the_controller() -> None:
        os.kill(first, signal.SIGKILL)
        time.sleep(60)

    with Kept() as kept:
        with pytest.raises(Exception, match="on purpose"):
            attempt(kept, tmp_path, badly)
        (first,) = processes("ray::Controller")
        attempt(kept, tmp_path, well)
        assert processes("ray::Controller") == {first}
        with pytest.raises(RayActorError):
            attempt(kept, tmp_path, kill_the_controller)
        until(lambda: not held())
        attempt(kept, tmp_path, well)
        (second,) = processes("ray::Controller")
        assert second != first
    until(lambda: not processes("ray::Controller"))
    assert not held()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, held()
        time.sleep(0.2)


def held() -> list[str]:
    """States of the placement groups that are still there."""
    table = ray.util.placement_group_table().values()
    return [group["state"] for group in table if group["state"] != "REMOVED"]
