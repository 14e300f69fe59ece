"""The run's account and figures as Prometheus gauges of the driver, exported by Ray.

Ray serves them on the metrics port of the driver's node, each with the prefix ``ray_``. They stand until the driver
ends. Seconds are a gauge, not a counter: work that is done again moves from ``step`` to ``lost_to_rework``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Gauge

from raymodels.ledger import Account

FIGURES = {
    "loss": "training loss of the last report, in nats per token",
    "eval_loss": "held-out loss of the last evaluation, in nats per token",
    "learning_rate": "of the last reported step",
    "grad_norm": "global gradient norm before clipping",
    "tokens_per_second": "over all ranks, while stepping",
    "model_flops_per_second": "over all ranks, while stepping",
}


def show(run: str, event: Mapping[str, Any], account: Account) -> None:
    """Set the gauges of a run to its account, and to what an event reports. Nothing happens before Ray is connected."""
    if not ray.is_initialized():
        return
    tags = {"run": run}
    _gauge("goodput_ratio", "share of the run's wall time that went to steps that count").set(account.goodput, tags)
    _gauge("wall_seconds", "since the run's first event").set(account.wall, tags)
    _gauge("restarts", "attempts of the run after its first").set(account.restarts, tags)
    _gauge("step", "optimizer steps that are done").set(account.step, tags)
    for kind, seconds in account.seconds.items():
        _gauge("seconds_total", "the run's wall time by what it went to", "kind").set(seconds, {**tags, "kind": kind})
    if event["kind"] == "report":
        _report(event, tags)


def _report(report: Mapping[str, Any], tags: dict[str, str]) -> None:
    for name, meaning in FIGURES.items():
        if name in report:
            _gauge(name, meaning).set(float(report[name]), tags)
    if "world_size" in report:
        _gauge("world_size", "ranks of the last report").set(report["world_size"], tags)
    group = -(-report.get("world_size", 0) // max(1, len(report["memory_bytes"]))) or 1
    for number, held in enumerate(report["memory_bytes"]):
        labels = {**tags, "rank": str(number * group)}
        _gauge("memory_bytes", "the most that a rank, or one of a group that begins with it, has held", "rank").set(
            held, labels
        )


@cache
def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"raymodels_train_{name}", meaning, tag_keys=("run", *labels))
