"""The gauges of a run, as Prometheus would scrape them from Ray."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

from raymodels.train.events import Events

PATIENCE_SECONDS = 60.0  # Ray exports every 10 s
FORGOTTEN_SECONDS = 24.0  # and what was not set for 20 s no more


def test_a_runs_account_reaches_rays_metrics(ray_cluster: Any, tmp_path: Path) -> None:
    figures = {"loss": 2.5, "memory_bytes": [5, 6], "world_size": 2, "tokens_per_second": 100.0}
    with Events(str(tmp_path / "measured"), None) as events:
        events({"time": 100.0, "kind": "started", "attempt": 1, "resumed_from_step": 0, "steps": 9})
        events({"time": 110.0, "kind": "report", "step": 5, **figures, "seconds": {"start": 4.0, "step": 6.0}})
        events({"time": 120.0, "kind": "failed", "attempt": 1, "cause": "a node left"})
        events({"time": 130.0, "kind": "started", "attempt": 2, "resumed_from_step": 5, "steps": 9})
    wanted = {
        "goodput_ratio": 0.2,
        "wall_seconds": 30.0,
        "restarts": 1.0,
        "step": 5.0,
        "loss": 2.5,
        "tokens_per_second": 100.0,
        "world_size": 2.0,
        "memory_bytes rank=0": 5.0,
        "memory_bytes rank=1": 6.0,
        "seconds_total kind=start": 4.0,
        "seconds_total kind=step": 6.0,
        "seconds_total kind=lost_to_rework": 10.0,
        "seconds_total kind=down": 10.0,
        "seconds_total kind=unaccounted": 0.0,
    }
    [node] = ray_cluster.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + PATIENCE_SECONDS
    found: dict[str, float] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        found = _scraped(page)
    assert found == wanted
    time.sleep(FORGOTTEN_SECONDS)
    assert _scraped(page) == wanted  # also where a run has had nothing to report for a while


def _scraped(url: str) -> dict[str, float]:
    """Our run's gauges by name and the label of their own."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("ray_raymodels_train_") and 'run="measured"' in line:
            name, _, rest = line.removeprefix("ray_raymodels_train_").partition("{")
            labels, _, value = rest.partition("} ")
            own = [f" {pair}".replace('"', "") for pair in labels.split(",") if pair.startswith(("kind=", "rank="))]
            found["".join([name, *own])] = float(value)
    return found
