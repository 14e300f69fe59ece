"""One training worker under Ray Train. Imports nothing heavy, so that what its start-up costs can be measured here."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymodels.train.meter import Phases


def work(job: dict[str, Any]) -> None:
    """What `ray.train.torch.TorchTrainer` runs on every worker.

    Args:
        job: ``config`` as plain data, ``prepared`` (a place), ``attempt``, ``started`` (unix seconds), ``beats`` (the
            folder of `Heart`), ``failures`` and ``seconds`` of the run before this attempt, ``resumed_from_step`` (the
            newest checkpoint that the driver sees, or 0), and ``evaluate_only``.
    """
    import ray.train

    from raymodels.niceness import give_way
    from raymodels.train.failure import telling
    from raymodels.train.heartbeat import Heart
    from raymodels.train.meter import Phases

    give_way()
    context, node = ray.train.get_context(), ray.get_runtime_context().get_node_id()
    heart = Heart(job["beats"], context.get_world_rank(), context.get_world_size(), node)
    phases = Phases(heart)
    phases.add("worker_start", time.time() - job["started"])
    try:
        with telling(context.get_world_rank(), node, phases.where):
            _train(job, phases, context.get_world_size())
    finally:
        heart.at("ending")


def _train(job: dict[str, Any], phases: Phases, world_size: int) -> None:
    import ray.train

    from raymodels.config import Config, validate

    config = validate(job["config"], Config)
    os.environ["DS_ACCELERATOR"] = "cuda" if config.workers.gpus else "cpu"  # DeepSpeed decides when it is imported
    with phases("imports"), _uncollected():
        import torch

        from raymodels.train import loop
        from raymodels.train.interval import Interval
        from raymodels.train.signals import Signals
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    warnings: list[str] = []
    session = loop.open_session(config, job["prepared"], phases, warnings.append, job["resumed_from_step"])

    def report(news: dict[str, Any]) -> None:
        with phases("report"):
            ray.train.report(news | {"warnings": warnings.copy()})
        warnings.clear()

    if job["evaluate_only"]:
        report({"step": session.state.step, "eval_loss": loop.evaluate(session, phases), "memory_bytes": 0})
        return
    interval = Interval(config.checkpoint.every, world_size, job["failures"], job["seconds"], time.monotonic())
    with Signals(config.place, job["attempt"], _preempted) as signals:
        loop.train(session, phases, report, signals, interval)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes a tenth of what imports take and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _preempted() -> bool:
    """Whether Ray has told this rank of a preemption.

    `ray.train.get_preemption_info` is a barrier of all ranks through an actor. The loop agrees in a collective that it
    does anyway, so this looks at the rank's own copy of the notice.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
