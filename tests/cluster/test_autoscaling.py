"""The autoscaling policy in a real Ray Serve: from zero, up under load, and back to zero, with nothing lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from raymodels.config import AutoscalingConfig
from raymodels.serve.engine import EngineStats
from raymodels.serve.load import LoadMeter
from raymodels.serve.scaling import serve_settings

POLICY = AutoscalingConfig(
    min_replicas=0,
    max_replicas=3,
    target_ongoing_requests=4,
    upscale_delay_s=2,
    downscale_delay_s=4,
    idle_s=4,
    start_up_s=5,
    max_step_down=1,
)


class Sleeper:
    """Answers all requests at once, when a file is there, and reports its load as a model's replica does."""

    def __init__(self) -> None:
        self.meter = LoadMeter()
        self.running = 0
        self.tokens = 0

    async def __call__(self, file: str) -> str:
        self.meter.arrived(1)
        self.running += 1
        try:
            while not Path(file).exists():
                await asyncio.sleep(0.1)
        finally:
            self.running -= 1
            self.tokens += 10
            self.meter.left(1)
        return file

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self.meter.report(EngineStats(self.running, 0, self.tokens, 0))


@pytest.fixture
def sleeper(ray_cluster: Any) -> Iterator[Any]:
    owned = not serve.status().proxies
    deployment = serve.deployment(Sleeper).options(
        name="sleeper",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=100,
        autoscaling_config=serve_settings(POLICY),
    )
    yield serve.run(deployment.bind(), name="sleeper", route_prefix=None)
    serve.delete("sleeper")
    if owned:
        serve.shutdown()


def replicas() -> int:
    """Those that answer."""
    states = serve.status().applications["sleeper"].deployments["sleeper"].replica_states
    return int(states.get("RUNNING", 0))


def wait_for(count: int, timeout_s: float = 120) -> None:
    start = time.monotonic()
    while replicas() != count:
        assert time.monotonic() - start < timeout_s, f"{replicas()} replicas instead of {count} after {timeout_s} s"
        time.sleep(0.25)


def test_from_zero_up_and_back_to_zero(sleeper: Any, tmp_path: Path) -> None:
    assert replicas() == 0
    file = tmp_path / "answer"
    held = [sleeper.remote(str(file)) for _ in range(12)]
    # Twelve requests at four to a replica are three, which only the policy knows: Serve orders the first one itself.
    wait_for(3)
    file.touch()
    assert [response.result(timeout_s=60) for response in held] == [str(file)] * 12, "held requests were lost"
    wait_for(0)
    assert sleeper.remote(str(file)).result(timeout_s=60) == str(file)
