"""The run's account and figures as Prometheus gauges of the driver, exported by Ray.

Ray serves them on the metrics port of the driver's node, each with the prefix ``ray_``. They stand until the driver
ends: Ray forgets a gauge that is not set for 20 seconds, so all are set again in time. Seconds are a gauge, not a
counter: work that is done again moves from ``step`` to ``lost_to_rework``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Gauge

from raymodels.ledger import Account

AGAIN_S = 8.0
FIGURES = {
    "loss": "training loss of the last report, in nats per token",
    "eval_loss": "held-out loss of the last evaluation, in nats per token",
    "learning_rate": "of the last reported step",
    "grad_norm": "global gradient norm before clipping",
    "tokens_per_second": "over all ranks, while stepping",
    "model_flops_per_second": "over all ranks, while stepping",
}


MEMORY = "the most that a rank, or one of a group that begins with it, has held"
_shown: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}


def show(run: str, event: Mapping[str, Any], account: Account) -> None:
    """Set the gauges of a run to its account, and to what an event reports. Nothing happens before Ray is connected."""
    if not ray.is_initialized():
        return
    _stand()
    tags = {"run": run}
    _set(_gauge("goodput_ratio", "share of the run's wall time that went to steps that count"), account.goodput, tags)
    _set(_gauge("wall_seconds", "since the run's first event"), account.wall, tags)
    _set(_gauge("restarts", "attempts of the run after its first"), account.restarts, tags)
    _set(_gauge("step", "optimizer steps that are done"), account.step, tags)
    for kind, seconds in account.seconds.items():
        _set(_gauge("seconds_total", "the run's wall time by what it went to", "kind"), seconds, {**tags, "kind": kind})
    if event["kind"] == "report":
        _report(event, tags)


def _report(report: Mapping[str, Any], tags: dict[str, str]) -> None:
    for name, meaning in FIGURES.items():
        if name in report:
            _set(_gauge(name, meaning), float(report[name]), tags)
    if "world_size" in report:
        _set(_gauge("world_size", "ranks of the last report"), report["world_size"], tags)
    group = -(-report.get("world_size", 0) // max(1, len(report["memory_bytes"]))) or 1
    for number, held in enumerate(report["memory_bytes"]):
        labels = {**tags, "rank": str(number * group)}
        _set(_gauge("memory_bytes", MEMORY, "rank"), held, labels)


@cache
def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"raymodels_train_{name}", meaning, tag_keys=("run", *labels))


def _set(gauge: Gauge, value: float, tags: dict[str, str]) -> None:
    _shown[gauge, tuple(tags.items())] = value
    gauge.set(value, tags)


@cache
def _stand() -> None:
    """Have all gauges set again from now on, once for this process."""

    def repeat() -> None:
        while True:
            time.sleep(AGAIN_S)
            for (gauge, tags), value in list(_shown.items()):
                if ray.is_initialized():
                    gauge.set(value, dict(tags))

    threading.Thread(target=repeat, name="gauges", daemon=True).start()
