"""Workers asked to leave: by SIGTERM to the driver, by room for more of them, by a driver that has taken over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.config import Config
from raymodels.errors import RunInUse, Stopped
from tests.conftest import altered

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 100_000


@pytest.fixture(scope="module")
def endless(tiny: dict[str, Any]) -> dict[str, Any]:
    """A run that only a request ends: it saves for no other reason."""
    train = {**tiny["train"], "steps": STEPS, "report_every": 5}
    return {**tiny, "train": train, "checkpoint": {"every": STEPS}, "eval": {"every": STEPS}}


class Follower:
    """Keeps a run's events, and does something at the first report of some attempts."""

    def __init__(self, deeds: dict[int, Callable[[], None]]) -> None:
        self.events: list[dict[str, Any]] = []
        self._deeds, self._attempt = dict(deeds), 0

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "started":
            self._attempt = event["attempt"]
        if event["kind"] == "report" and self._attempt in self._deeds:
            self._deeds.pop(self._attempt)()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_an_elastic_run_grows_once_there_is_room_and_sigterm_ends_it(
    endless: dict[str, Any], tmp_path: Path, ray_cluster: Any
) -> None:
    from raymodels.train.launch import train

    class Neighbour:
        def there(self) -> bool:
            return True

    neighbour = ray_cluster.remote(num_cpus=3)(Neighbour).remote()
    assert ray_cluster.get(neighbour.there.remote())
    config = altered(endless, tmp_path, workers={"count": [1, 2], "resize_after_s": 1})
    follower = Follower({1: lambda: ray_cluster.kill(neighbour), 2: terminate})
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="which is committed"):
        train(config, follower)
    assert signal.getsignal(signal.SIGTERM) == handler
    grown, _ = follower.of("failed")  # the other is SIGTERM's
    assert (grown["fault"], grown["retry"]) == ("resize", True)
    assert [notice for notice in follower.of("notice") if "room for 2 workers, not just 1" in notice["text"]]
    sizes = [report["world_size"] for report in follower.of("report")]
    assert sizes == sorted(sizes) and {*sizes} == {1, 2}
    steps = [report["step"] for report in follower.of("report")]
    assert len({*steps}) == len(steps)  # nothing was done twice
    assert sorted(layout.samples(config.place)) == list(range(steps[-1]))
    newest = layout.latest(config.place)
    assert newest is not None and newest.step == steps[-1] < STEPS


def test_a_driver_that_was_replaced_leaves_its_run_alone(
    endless: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymodels.train import ownership
    from raymodels.train.launch import train

    monkeypatch.setattr(ownership, "REFRESH_SECONDS", 0.5)
    config = altered(endless, tmp_path)

    def take_over() -> None:
        mine = storage.read_json(_owner(config, 1))
        storage.write_json(_owner(config, 2), {**mine, "host": "elsewhere", "pid": 7, "seen": time.time()})

    follower = Follower({1: take_over})
    with pytest.raises(RunInUse, match="process 7 on elsewhere"):
        train(config, follower)
    assert layout.latest(config.place) is None
    assert not storage.read_json(_owner(config, 2))["released"]


def _owner(config: Config, number: int) -> str:
    return f"{config.place}/owner/{number:08d}.json"
