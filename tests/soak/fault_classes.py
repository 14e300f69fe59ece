"""Twenty faults put into real Ray Train workers, each alone, and what `raymodels.train.faults` makes of each.

Two ranks do collectives in a loop; the fault strikes one of them, or both, after two steps. So most faults arrive as a
run's do: together with the failure of the rank that was left waiting. Processes are really killed and stopped, a node
really dies, another is really drained, files are really torn. GPU memory alone cannot run out without a GPU: there the
real exception is raised with its real text.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from benchmarks.report import Bar, report
from raymodels import storage
from raymodels.cluster import alive_nodes, settled_nodes
from raymodels.config import Config, RetryConfig, validate
from raymodels.data.dataset import open_prepared
from raymodels.data.prepare import prepare
from raymodels.train.attempt import Evidence
from raymodels.train.divergence import Divergence
from raymodels.train.failure import telling
from raymodels.train.faults import Fault, classify
from raymodels.train.heartbeat import Heart
from raymodels.train.watch import watch
from tests.soak.size import small

HEALTHY_STEPS, SECONDS_PER_STEP, LONGEST_S = 4, 0.25, 90.0
VICTIM = 1
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.12 GiB is "
    "free. Process 4242 has 78.02 GiB memory in use. Of the allocated memory 75.61 GiB is allocated by PyTorch, and "
    "1.70 GiB is reserved by PyTorch but unallocated."
)

Job = dict[str, Any]


class Odd(Exception):
    """What cannot be pickled, as user code has it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.lock = threading.Lock()


def wrong_type(job: Job) -> None:
    job["fault"] += 1


def missing_module(job: Job) -> None:
    import module_that_nobody_installed  # type: ignore[import-not-found]  # noqa: F401


def failed_assertion(job: Job) -> None:
    assert job["folder"] == "elsewhere", "the folder is another"


def unpicklable(job: Job) -> None:
    raise Odd(7, "an error of the user's own")


def wrong_shapes(job: Job) -> None:
    torch.nn.Linear(8, 8)(torch.ones(4, 9))


def torn_shard(job: Job) -> None:
    """Torn while it is in use: the split was opened before."""
    split = open_prepared(job["prepared"]).split("train", 32, True)
    split.sample(0)
    for shard in Path(job["prepared"]).glob("train-*.bin"):
        os.truncate(shard, shard.stat().st_size // 2)
    split.sample(len(split) - 1)


def missing_shard(job: Job) -> None:
    for shard in Path(job["prepared"]).glob("train-*.bin"):
        shard.unlink()
    open_prepared(job["prepared"]).split("train", 32, True)


def full_disk(job: Job) -> None:
    storage.append("/dev/full", b"x" * 100_000)


def no_permission(job: Job) -> None:
    storage.write_bytes("/sys/raymodels", b"x")  # refused to everyone, also to root


def unreachable_s3(job: Job) -> None:
    os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    storage.write_bytes("s3://bucket/file", b"x")


def torch_host_memory(job: Job) -> None:
    torch.empty(10**15)


def python_host_memory(job: Job) -> None:
    bytearray(10**15)


def host_fills_up(job: Job) -> None:
    """Up to 6 GiB, which is more than the node is allowed; its raylet kills the worker."""
    kept = []
    for _ in range(60):
        kept.append(b"x" * (100 << 20))
        time.sleep(0.05)
    time.sleep(LONGEST_S)


def gpu_memory(job: Job) -> None:
    raise torch.OutOfMemoryError(CUDA_TEXT)


def killed(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(job: Job) -> None:
    ctypes.string_at(0)


def stopped(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def skips_a_collective(job: Job) -> None:
    time.sleep(LONGEST_S)


def loss_diverges(job: Job) -> None:
    """A regression at a learning rate that is far too high."""
    raw = {**job["config"], "train": {**job["config"]["train"], "divergence": {"window": 5, "patience": 3}}}
    policy, weight = Divergence(validate(raw, Config).train), torch.ones(4, requires_grad=True)
    for step in range(200):
        loss = ((weight * torch.arange(4.0)).sum() - 1).square()
        weight.grad = None
        loss.backward()
        assert weight.grad is not None
        decision = policy.judge(step, loss.item(), weight.grad.norm().item())
        if decision.action == "stop":
            raise decision.error()
        with torch.no_grad():
            weight -= (0.001 if step < 10 else 10.0) * weight.grad


def nothing(job: Job) -> None:
    """The fault comes from outside."""


@dataclass(frozen=True)
class Injected:
    """A fault. ``where`` are the nodes that the workers run on; ``strikes`` happens on the driver meanwhile."""

    name: str
    kind: str
    inject: Callable[[Job], None]
    where: str = "head"
    strikes: str = ""
    watched: bool = False
    small: bool = False


SUITE = [
    Injected("TypeError", "user_bug", wrong_type, small=True),
    Injected("missing import", "user_bug", missing_module),
    Injected("failed assertion", "user_bug", failed_assertion),
    Injected("unpicklable error", "user_bug", unpicklable),
    Injected("wrong tensor shapes", "user_bug", wrong_shapes),
    Injected("shard torn in use", "data", torn_shard, small=True),
    Injected("shard missing", "data", missing_shard),
    Injected("disk full", "storage", full_disk, small=True),
    Injected("no permission", "storage", no_permission),
    Injected("S3 unreachable", "storage", unreachable_s3),
    Injected("torch's host allocator", "out_of_memory_host", torch_host_memory),
    Injected("MemoryError", "out_of_memory_host", python_host_memory),
    Injected("node's memory fills up", "out_of_memory_host", host_fills_up, where="small"),
    Injected("GPU memory", "out_of_memory_device", gpu_memory),
    Injected("SIGKILL", "worker_killed", killed, small=True),
    Injected("SIGSEGV", "worker_killed", crashes),
    Injected("SIGSTOP", "hang", stopped, watched=True),
    Injected("skipped collective", "hang", skips_a_collective, watched=True),
    Injected("node dies", "lost_node", nothing, where="spot", strikes="kill", small=True),
    Injected("node is taken back", "preemption", nothing, where="spot", strikes="drain"),
]
# A loss that diverges is no fault of a process, so it stands beside the twenty.
BESIDE = [Injected("loss diverges", "diverged", loss_diverges)]
BY_NAME = {fault.name: fault for fault in SUITE + BESIDE}


def train_function(job: Job) -> None:
    """What every worker runs."""
    context = ray.train.get_context()
    rank, node, step = context.get_world_rank(), ray.get_runtime_context().get_node_id(), 0
    with telling(rank, node, lambda: f"step {step}"):
        heart = Heart(job["beats"], rank, context.get_world_size(), node) if job["beats"] else None
        ends = time.monotonic() + LONGEST_S
        while time.monotonic() < ends:
            step += 1
            if heart:
                heart.at("data", step)
            if step == HEALTHY_STEPS:
                (Path(job["folder"]) / f"ready-{rank}").touch()
                if rank == VICTIM:
                    BY_NAME[job["fault"]].inject(job)
            if heart:
                heart.at("step", step)
            dist.all_reduce(torch.ones(1))
            time.sleep(SECONDS_PER_STEP)


class Machine:
    """Several nodes of Ray on this one, to lose some of."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def prepare(self, where: str) -> Any:
        """The nodes for a fault; returns the one that it strikes."""
        if where == "small":
            memory = psutil.virtual_memory()
            allowed = (memory.total - memory.available + (3 << 30)) / memory.total
            limits = {"RAY_memory_usage_threshold": str(allowed), "RAY_memory_monitor_refresh_ms": "100"}
            os.environ |= limits
            node = self.cluster.add_node(num_cpus=2, resources={"small": 2})
            for name in limits:
                del os.environ[name]
            return node
        if where == "spot":
            struck, _ = (self.cluster.add_node(num_cpus=1, resources={"spot": 1}) for _ in range(2))
            return struck
        return None

    def strike(self, how: str, node: Any) -> None:
        if how == "kill":
            self.cluster.remove_node(node, allow_graceful=False)
        elif how == "drain":
            from ray._raylet import GcsClient  # type: ignore[attr-defined]
            from ray.core.generated.autoscaler_pb2 import DrainNodeReason

            deadline = int((time.time() + 8) * 1000)
            reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
            GcsClient(address=self.cluster.gcs_address).drain_node(node.node_id, reason, "taken back", deadline)

    def clear(self) -> None:
        """Only the head stays."""
        for node in [node for node in self.cluster.list_all_nodes() if node is not self.cluster.head_node]:
            self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def strike_when_ready(machine: Machine, fault: Injected, node: Any, folder: str, over: threading.Event) -> None:
    while not over.wait(0.2):
        if len(list(Path(folder).glob("ready-*"))) == 2:
            machine.strike(fault.strikes, node)
            return


def run(machine: Machine, fault: Injected, folder: str, config: Config, prepared: str) -> tuple[Fault, float]:
    """Inject a fault; what is made of it, and the seconds until then."""
    node = machine.prepare(fault.where)
    Path(folder).mkdir()
    shutil.copytree(prepared, f"{folder}/prepared")
    evidence, over = Evidence(), threading.Event()
    before = alive_nodes()
    striker = threading.Thread(target=strike_when_ready, args=(machine, fault, node, folder, over), daemon=True)
    striker.start()
    start = time.monotonic()
    try:
        with watch(functools.partial(setattr, evidence, "verdict")) if fault.watched else nullcontext("") as beats:
            job = {"fault": fault.name, "folder": folder, "prepared": f"{folder}/prepared", "beats": beats}
            trainer(job | {"config": config.model_dump(mode="json", by_alias=True)}, fault).fit()
    except Exception as error:
        seconds = time.monotonic() - start
        evidence.nodes_lost = tuple(before - settled_nodes())
        return classify(error, evidence, RetryConfig(), Counter()), seconds
    finally:
        over.set()
        striker.join()
        machine.clear()
    raise AssertionError(f"{fault.name} did no harm")


def trainer(job: Job, fault: Injected) -> TorchTrainer:
    resources = {"CPU": 1.0} | ({fault.where: 1.0} if fault.where != "head" else {})
    return TorchTrainer(
        train_function,
        train_loop_config=job,
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker=resources),
        run_config=RunConfig(
            name="fault",
            storage_path=job["folder"],
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def main() -> int:
    asked = [fault for fault in SUITE + BESIDE if fault.small or not small()]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    os.environ |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(20):
            (Path(folder) / f"{number}.txt").write_text(f"text {number} of a few words. " * 40)
        config = tiny(folder)
        prepared = prepare(config).place
        machine = Machine()
        try:
            for fault in asked:
                found, seconds = run(machine, fault, f"{folder}/{len(rows)}", config, prepared)
                row = {
                    "fault": fault.name,
                    "is": fault.kind,
                    "found": found.kind,
                    "retry": "yes" if found.retry else "no",
                }
                rows.append(row | {"seconds": seconds, "cause": found.cause})
                print(f"{fault.name}: {found.kind}, {seconds:.0f} s: {found.cause}", file=sys.stderr)
                if found.kind != fault.kind:
                    print(found.trace, file=sys.stderr)
        finally:
            machine.close()
    suite = [row for row in rows if row["fault"] != BESIDE[0].name]
    right = sum(row["is"] == row["found"] for row in suite)
    retried = sum(row["retry"] == "yes" for row in rows if row["is"] == "user_bug")
    named = sum("rank" in row["cause"] for row in rows)
    bars = [
        Bar("classified_right", right, ">=", 19 if len(suite) == 20 else len(suite)),
        Bar("user_bugs_retried", retried, "==", 0),
        Bar("causes_that_name_a_rank", named, "==", len(rows)),
    ]
    return report("fault_classes", rows, bars)


def tiny(folder: str) -> Config:
    return validate(
        {
            "run": {"name": "faults", "storage": folder},
            "data": {
                "source": f"{folder}/*.txt",
                "seq_len": 32,
                "eval_fraction": 0.2,
                "tokenizer": {"vocab_size": 300},
                "prepared": f"{folder}/prepared",
            },
            "model": {"arch": "llama", "hidden_size": 32, "layers": 1, "heads": 2},
            "train": {"steps": 4, "global_batch": 4, "micro_batch": 2, "lr": 1e-3},
            "workers": {"count": 2},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
