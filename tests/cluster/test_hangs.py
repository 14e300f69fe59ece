"""The watch over real Ray Train workers: a stopped one is named and killed, which ends the attempt."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from raymodels.train.heartbeat import here
from raymodels.train.verdict import STOPPED, Bounds, Verdict
from raymodels.train.watch import ANSWER_SECONDS, RayNodes, watch

pytestmark = pytest.mark.usefixtures("ray_cluster")


def stop_in_the_midst(job: dict[str, Any]) -> None:
    """A training loop of all-reduces, in which rank 1 stops itself at step 20."""
    import ray
    import ray.train
    import torch
    import torch.distributed as dist

    from raymodels.train.heartbeat import Heart

    context = ray.train.get_context()
    node = ray.get_runtime_context().get_node_id()
    heart = Heart(job["beats"], context.get_world_rank(), context.get_world_size(), node)
    for step in range(100_000):
        heart.at("step", step)
        if (context.get_world_rank(), step) == (1, 20):
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(()))
        time.sleep(0.01)


def test_a_stopped_worker_is_named_and_killed(tmp_path: Path) -> None:
    from ray.train import LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    verdicts: list[Verdict] = []
    with watch(verdicts.append, bounds=Bounds(seconds=4.0)) as beats:
        trainer = TorchTrainer(
            stop_in_the_midst,
            train_loop_config={"beats": beats},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name="hang", storage_path=str(tmp_path), logging_config=LoggingConfig(log_level="WARNING")
            ),
        )
        with pytest.raises(TrainingFailedError):
            trainer.fit()
    [verdict] = verdicts
    assert (verdict.rank, verdict.kind, verdict.phase, verdict.step) == (1, STOPPED, "step", 20)
    assert "stop_in_the_midst (" in verdict.stack  # and perhaps in the collective: the signal takes a moment
    assert verdict.others[0].startswith("all_reduce of stop_in_the_midst ("), verdict.others
    assert not here(beats).exists()


def test_a_node_whose_sentry_is_silent_is_told_as_unreachable(tmp_path: Path) -> None:
    import ray

    from raymodels.train.heartbeat import Heart

    folder, nodes = str(tmp_path / "beats"), None
    Heart(folder, 0, 1, ray.get_runtime_context().get_node_id())
    try:
        nodes = RayNodes(folder)
        deadline = time.monotonic() + 60
        while not (beats := nodes.beats()):
            assert time.monotonic() < deadline
        assert beats[0].pid == os.getpid()
        assert beats[0].status != "unreachable"
        [sentry] = nodes._sentries.values()
        pid = ray.get(sentry.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGSTOP)
        nodes.beats()
        time.sleep(1)
        [frozen] = nodes.beats()
        assert frozen.status == "unreachable"
        assert frozen.silent > ANSWER_SECONDS
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while nodes.beats()[0].status == "unreachable":
            assert time.monotonic() < deadline
    finally:
        if nodes:
            nodes.close()
