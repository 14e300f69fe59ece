"""What a fault costs: workers and nodes are killed and taken back under an elastic run, which ends all the same.

One run of 2 to 4 workers loses a worker (kill -9), a node (without warning) and another node (with notice), and is held
against the same run left in peace. A second run loses a worker only, so its number of workers never changes, and must
end with the same bits. How long a restart takes is set beside plain Ray Train's restarts, with its own settings, of as
many workers with a loop that does nothing: after a killed worker, and of an elastic group after a lost node.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.report import Bar, quick, report
from raymodels.checkpoint.layout import open_checkpoint
from raymodels.checkpoint.shards import Shards
from raymodels.config import Config, load
from raymodels.ledger import Ledger
from raymodels.train.launch import train

EVERY = 10
FAULTS = ("killed_worker", "killed_worker_of_4", "lost_node")  # abrupt ones, in the order in which they strike
Event = dict[str, Any]


def config_of(folder: str, name: str, steps: int, count: str) -> Config:
    stdlib = sysconfig.get_path("stdlib")
    return load(
        Path(__file__).parents[1] / "jobs/configs/demo.yaml",
        [
            *[f"run.name={name}", f"run.storage={folder}", f"data.prepared={folder}/prepared", "publish=null"],
            *[f"data.source={stdlib}/asyncio/*.py", "data.eval_fraction=0.2", "data.seq_len=64"],
            *["model.hidden_size=64", "model.layers=2", "model.heads=4", "train.global_batch=8"],
            *[f"train.steps={steps}", "train.report_every=1", f"checkpoint.every={EVERY}", f"eval.every={steps}"],
            *[f"workers.count={count}", "eval.samples=8", "workers.resize_after_s=600"],
        ],
    )


class Disturber:
    """Follows a run and does each thing once the run has reported a step; then times the next report."""

    def __init__(self, deeds: dict[int, Callable[[], None]]) -> None:
        self._deeds, self._done_at, self._last = dict(deeds), 0.0, 0
        self.recoveries: list[Event] = []

    def __call__(self, event: Event) -> None:
        if event["kind"] == "failed" and self.recoveries:
            self.recoveries[-1]["cause"] = event["fault"]
        if event["kind"] != "report":
            return
        if self._done_at and "phases" in event:  # the first step of an attempt
            self.recoveries[-1]["seconds"] = time.monotonic() - self._done_at
            # Reports of the last steps before a fault may be lost, so the next step may be later than was heard of.
            self.recoveries[-1]["redone"] = max(0, self._last + 1 - event["step"])
            self.recoveries[-1]["workers"] = event["world_size"]
            self._done_at = 0.0
        self._last = event["step"]
        if not self._done_at and self._deeds and event["step"] >= min(self._deeds):
            deed = self._deeds.pop(min(self._deeds))
            self.recoveries.append({"deed": deed.__name__, "step": event["step"]})
            self._done_at = time.monotonic()
            threading.Thread(target=deed).start()


def kill_a_worker() -> None:
    """SIGKILL the newest training process of this machine."""
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    os.kill(max(workers, key=lambda process: process.create_time()).pid, signal.SIGKILL)


def weights_difference(one: Config, other: Config) -> float:
    """The largest difference of any master weight, relative to the largest weight."""
    ours, theirs = (Shards(open_checkpoint(config.place).place) for config in (one, other))
    pairs = [(ours.weight(name), theirs.weight(name)) for name in ours.shapes]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def plain_restart(workers: int | tuple[int, int], deed: Callable[[], None]) -> Event:
    """Plain Ray Train under a fault: seconds from the deed until every worker of an empty loop turns again."""
    os.environ.pop("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", None)  # which raymodels sets; here are Ray's own settings
    with tempfile.TemporaryDirectory() as folder:

        def loop(settings: dict[str, Any]) -> None:
            marks, context = Path(settings["folder"]), ray.train.get_context()
            again = (marks / "struck").exists()
            (marks / f"{'again' if again else 'begun'}-{context.get_world_rank()}-{time.time()}").touch()
            if not again:
                time.sleep(600)

        def strike() -> None:
            while len(list(marks.glob("begun-*"))) < (workers if isinstance(workers, int) else workers[1]):
                time.sleep(0.1)
            time.sleep(2)
            (marks / "struck").touch()
            deed()

        settings = RunConfig(storage_path=folder, name="plain", failure_config=FailureConfig(max_failures=3))
        scaling = ScalingConfig(num_workers=workers)
        marks = Path(folder) / "marks"
        marks.mkdir()
        striker = threading.Thread(target=strike)
        striker.start()
        TorchTrainer(loop, train_loop_config={"folder": str(marks)}, scaling_config=scaling, run_config=settings).fit()
        striker.join()
        struck = (marks / "struck").stat().st_mtime
        again = [float(mark.name.rsplit("-", 1)[1]) for mark in marks.glob("again-*")]
    return {"deed": f"plain: {deed.__name__}", "workers": len(again), "seconds": max(again) - struck}


def main() -> int:
    steps = 90 if quick() else 180
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def lose_a_node() -> None:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)

    def take_a_node_back() -> None:
        drain(nodes[0].node_id)

    with tempfile.TemporaryDirectory() as folder:
        peace = config_of(folder, "peace", steps, "2")
        train(peace)
        same = config_of(folder, "same", steps // 2, "2")
        train(same)
        killed = config_of(folder, "killed", steps // 2, "2")
        first = Disturber({steps // 4: kill_a_worker})
        train(killed, first)
        plain = [plain_restart(2, kill_a_worker), plain_restart(4, kill_a_worker), plain_restart((2, 4), lose_a_node)]
        nodes.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes()
        elastic = config_of(folder, "elastic", steps, "[2,4]")
        third = steps // 4
        deeds = {third + 3: kill_a_worker, 2 * third + 3: lose_a_node, 3 * third + 3: take_a_node_back}
        rest = Disturber(deeds)
        ledger = Ledger()

        def follow(event: Event) -> None:
            rest(event)
            ledger.add(event)

        train(elastic, follow)
        bits, close = weights_difference(killed, same), weights_difference(elastic, peace)
    account = ledger.account()
    recoveries = first.recoveries + rest.recoveries
    columns = ("deed", "cause", "step", "redone", "workers", "seconds")
    rows = [{name: each.get(name, "") for name in columns} for each in recoveries + plain]
    noticed = [each for each in rest.recoveries if each["deed"] == "take_a_node_back"]
    abrupt = [each for each in recoveries if each not in noticed]
    bars = [
        Bar("weights_difference_same_workers", bits, "==", 0.0),
        Bar("weights_difference_elastic", close, "<=", 1e-5),
        Bar("recoveries", len(rest.recoveries), "==", 3),
        Bar("most_steps_redone", max(each.get("redone", math.inf) for each in abrupt), "<=", EVERY),
        Bar("steps_redone_with_notice", max(each.get("redone", math.inf) for each in noticed), "<=", 1),
        *[
            Bar(f"{name}_of_plain_restart", ours["seconds"] / peer["seconds"], "<=", 1.5)
            for name, ours, peer in zip(FAULTS, abrupt, plain, strict=True)
        ],
        Bar("ledger_off_by", abs(sum(account.seconds.values()) / account.wall - 1), "<=", 0.01),
    ]
    status = report("recovery", rows, bars)
    ray.shutdown()
    cluster.shutdown()
    return status


def drain(node_id: str) -> None:
    """Give a node's notice as a cloud provider's agent does: ten seconds, because of preemption."""
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + 10) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = global_worker.gcs_client.drain_node(node_id, reason, "preempted", deadline_ms)
    assert accepted, why


if __name__ == "__main__":
    sys.exit(main())
