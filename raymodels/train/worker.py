"""One training worker under Ray Train. Imports nothing heavy, so that what its start-up costs can be measured here."""

from __future__ import annotations

import os
import time
from typing import Any


def work(job: dict[str, Any]) -> None:
    """What `ray.train.torch.TorchTrainer` runs on every worker.

    Args:
        job: ``config`` as plain data, ``prepared`` (a place), ``started`` (unix seconds), and ``evaluate_only``.
    """
    import ray.train

    from raymodels.config import Config, validate
    from raymodels.train.meter import Phases

    phases = Phases()
    phases.seconds["worker_start"] = time.time() - job["started"]
    config = validate(job["config"], Config)
    os.environ["DS_ACCELERATOR"] = "cuda" if config.workers.gpus else "cpu"  # DeepSpeed decides when it is imported
    with phases("imports"):
        import torch

        from raymodels.train import loop
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    session = loop.open_session(config, job["prepared"], ray.train.get_context().get_local_rank(), phases)
    if job["evaluate_only"]:
        ray.train.report({"step": session.state.step, "eval_loss": loop.evaluate(session), "memory_bytes": 0})
    else:
        loop.train(session, phases, ray.train.report)
