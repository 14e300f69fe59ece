"""The ledger of a real run whose workers are killed: every second of it has a kind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymodels.checkpoint import layout
from raymodels.runs import open_run
from tests.conftest import altered

KILLS, EVERY, STEPS = 3, 10, 120

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_run_with_three_restarts_sums_to_its_wall_time(tiny: dict[str, Any], tmp_path: Path) -> None:
    from raymodels.train.launch import train

    often = {"checkpoint": {"every": EVERY}, "eval": {"every": STEPS}}
    config = altered(tiny, tmp_path, train={"steps": STEPS, "report_every": 5}, **often)

    def kill_a_worker_after_new_checkpoints() -> None:
        for kill in range(1, KILLS + 1):
            while (found := layout.latest(config.place)) is None or found.step < kill * 2 * EVERY:
                time.sleep(0.02)
            os.kill(min(_train_workers()), signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker_after_new_checkpoints, daemon=True)
    killer.start()
    began, heard = time.time(), []
    train(config, heard.append)
    wall = time.time() - began
    killer.join()

    run = open_run(str(tmp_path), config.run.name)
    found = run.account
    assert run.record.damaged == [] and run.state()[0] == "finished"
    assert found.restarts == KILLS and [attempt.ending for attempt in found.attempts][:KILLS] == ["failed"] * KILLS
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
    assert found.error <= 0.01 * found.wall, found.seconds
    assert found.begin >= began and found.wall <= wall
    assert found.wall >= 0.99 * (wall - (found.begin - began))  # what came before is the data's preparation
    assert found.step == STEPS and max(run.curve("loss")) == STEPS
    assert {"scheduling", "start", "restore", "compile", "step", "lost_to_rework"} <= found.seconds.keys()


def _train_workers() -> set[int]:
    """Process ids of Ray Train's workers among this test run's own descendants."""
    ours = psutil.Process().children(recursive=True)
    return {process.pid for process in ours if "RayTrainWorker" in " ".join(process.cmdline())}
