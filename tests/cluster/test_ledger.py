"""A real run whose workers are killed: it costs time only, and every second of it has a kind."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.checkpoint.shards import Shards
from raymodels.config import Config
from raymodels.runs import open_run
from tests.conftest import altered
from tests.processes import descendants

KILLS, EVERY, STEPS = 2, 10, 80

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True)
class Killed:
    """A finished run, a worker of which was killed in each attempt but the last."""

    config: Config
    checkpoint: layout.Checkpoint
    events: list[dict[str, Any]]
    began: float
    wall: float

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def saving_often(tiny: dict[str, Any], storage: Path) -> Config:
    sections = {"checkpoint": {"every": EVERY}, "eval": {"every": STEPS}}
    return altered(tiny, storage, train={"steps": STEPS, "report_every": 5}, **sections)


@pytest.fixture(scope="module")
def killed(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Killed:
    from raymodels.train.launch import train

    config = saving_often(tiny, tmp_path_factory.mktemp("killed"))

    def kill_a_worker_after_new_checkpoints() -> None:
        for kill in range(1, KILLS + 1):
            while (found := layout.latest(config.place)) is None or found.step < kill * 2 * EVERY:
                time.sleep(0.02)
            os.kill(min(_train_workers()), signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker_after_new_checkpoints, daemon=True)
    killer.start()
    began, events = time.time(), list[dict[str, Any]]()
    result = train(config, events.append)
    wall = time.time() - began
    killer.join()
    return Killed(config, result.checkpoint, events, began, wall)


def test_killed_workers_cost_only_time(tiny: dict[str, Any], tmp_path: Path, killed: Killed) -> None:
    from raymodels.train.launch import train

    assert [(event["fault"], event["retry"]) for event in killed.of("failed")] == [("worker_killed", True)] * KILLS
    started = killed.of("started")
    assert [event["attempt"] for event in started] == list(range(1, KILLS + 2))
    resumed = [event["resumed_from_step"] for event in started]
    assert resumed == sorted({*resumed}) and resumed[0] == 0 and resumed[-1] < STEPS
    assert "worker_killed" in storage.read_bytes(f"{killed.config.place}/log/attempt-1.txt").decode()
    undisturbed = train(saving_often(tiny, tmp_path))
    found, expected = (Shards(checkpoint.place) for checkpoint in (killed.checkpoint, undisturbed.checkpoint))
    for name in expected.shapes:
        assert (found.weight(name) == expected.weight(name)).all(), name
    fed = layout.samples(killed.config.place)
    assert sorted(fed) == list(range(STEPS))
    assert fed == layout.samples(undisturbed.place)


def test_a_run_with_restarts_sums_to_its_wall_time(killed: Killed) -> None:
    run = open_run(killed.config.run.storage, killed.config.run.name)
    found = run.account
    assert run.record.damaged == [] and run.state()[0] == "finished"
    assert found.restarts == KILLS and [attempt.ending for attempt in found.attempts][:KILLS] == ["failed"] * KILLS
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
    assert found.error <= 0.01 * found.wall, found.seconds
    assert found.begin >= killed.began and found.wall <= killed.wall
    assert found.wall >= 0.99 * (killed.wall - (found.begin - killed.began))  # before it, the data's preparation
    assert found.step == STEPS and max(run.curve("loss")) == STEPS
    assert {"scheduling", "start", "restore", "compile", "step", "lost_to_rework"} <= found.seconds.keys()


def _train_workers() -> set[int]:
    """Process ids of Ray Train's workers among this test run's own descendants."""
    return {process.pid for process in descendants(psutil.Process(), "RayTrainWorker")}
