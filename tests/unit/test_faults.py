"""Errors as Ray Train hands them over, made by raising the real ones, and what is told of them."""

from __future__ import annotations

import errno
import os
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray import exceptions as ray_errors
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal import exceptions as train_errors
from ray.train.v2.api.preemption import PreemptionInfo

from raymodels import storage
from raymodels.config import RetryConfig
from raymodels.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    Diverged,
    IntegrityError,
    StorageError,
    TrainingError,
)
from raymodels.train.attempt import Evidence
from raymodels.train.failure import WorkerFailure, telling
from raymodels.train.faults import PRECEDENCE, REMEDIES, Fault, classify, write_log
from raymodels.train.verdict import Verdict

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = f"{GLOO}pair.cc:553] Connection closed by peer [10.0.0.7]:17083. This is typically caused by a remote worker"
RESET = f"{GLOO}pair.cc:537] Read error [10.0.0.7]:58574: Connection reset by peer. This is typically caused by"
TIMED_OUT = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
NODE, OTHER_NODE = "36f7a9fcc861a59893ae06247adf45b85dab364e43c314647cee49d2", "7c" * 28
INFO = f"""A worker health check failed.
Worker info: Worker(
  actor=Actor(RayTrainWorker, 5d00fba2f4714aa6f9e592ee01000000),
  metadata=ActorMetadata(
    hostname='node-7',
    node_id='{NODE}',
    node_ip='192.0.2.2',
    pid=15107,
  ),
)"""
DIED = (
    "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End "
    "of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
)


def died(
    message: str = DIED, preempted: bool = False, kind: type[ray_errors.RayActorError] = ray_errors.ActorDiedError
):
    """A dead worker, as Ray Train wraps it."""
    error = kind() if kind is ray_errors.ActorDiedError else kind(message, None)
    error.error_msg, error._preempted = message, preempted
    return train_errors.WorkerHealthCheckFailedError(INFO, error)


def told(raises: Callable[[], Any], rank: int = 1) -> WorkerFailure:
    """What a rank's error has become on the driver."""
    with pytest.raises(WorkerFailure) as raised, telling(rank, OTHER_NODE, lambda: "step 12, phase data"):
        raises()
    return pickle.loads(pickle.dumps(raised.value))


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


def fault(
    *failures: Any, evidence: Evidence | None = None, happened: dict[str, int] | None = None, **rules: Any
) -> Fault:
    """Of ranks 0, 1 and so on; None for one that has not failed."""
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    error = WorkerGroupError("as Ray Train writes it", failed)
    return classify(error, evidence or Evidence(), RetryConfig(**rules), Counter(happened or {}))


def missing_key() -> None:
    {}["learning_rate"]


def odd() -> None:
    class Odd(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(f"{code} {text}")
            self.lock = threading.Lock()

    raise Odd(1, "an error of the user's own")


def while_handling_a_refused_connection() -> None:
    try:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    except ConnectionRefusedError:
        missing_key()


@pytest.mark.parametrize(
    ("raises", "said"),
    [
        (missing_key, "KeyError: 'learning_rate'"),
        (odd, "Odd: 1 an error of the user's own"),
        (lambda: torch.nn.Linear(8, 8)(torch.ones(4, 9)), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (lambda: __import__("no_such_module"), "ModuleNotFoundError: No module named 'no_such_module'"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: Path("/no/such/file").read_text(), "FileNotFoundError: .*No such file"),
        (raising(AssertionError()), r"AssertionError \("),
        (raising(ValueError("CUDA out of memory")), "ValueError: CUDA out of memory"),
        (while_handling_a_refused_connection, "KeyError: 'learning_rate'"),
    ],
)
def test_user_bugs_are_never_retried_and_named_with_their_place(raises: Callable[[], Any], said: str) -> None:
    always = dict.fromkeys(RetryConfig.model_fields, "always")
    found = fault(RuntimeError(CLOSED), told(raises), **always)
    assert (found.kind, found.retry) == ("user_bug", False)
    expect = rf"rank 1 on \S+ \(node 7c7c7c7c7c7c, pid {os.getpid()}\) at step 12, phase data raised {said}"
    assert re.match(expect, found.cause), found.cause
    assert __file__ in found.cause or "site-packages" in found.cause
    assert "Traceback (most recent call last)" in found.trace
    assert str(found.error) == f"{found.cause}. {found.remedy}." and type(found.error) is TrainingError


def test_bare_errors_of_ray_train_are_read_too() -> None:
    assert fault(None, TypeError("unsupported operand")).cause.startswith(
        "rank 1 raised TypeError: unsupported operand"
    )
    unpicklable = ray_errors.RayTaskError("poll_status", "Traceback", TypeError("cannot pickle '_thread.lock' object"))
    found = fault(train_errors.WorkerHealthCheckFailedError(INFO, unpicklable.as_instanceof_cause()))
    assert (found.kind, found.retry) == ("user_bug", False)
    assert "rank 0 on node-7 (node 36f7a9fcc861, pid 15107) raised TypeError: cannot pickle" in found.cause


@pytest.mark.parametrize(
    ("raises", "kind"),
    [
        (raising(DataError("shard.bin has 8 bytes, not 16, at sample 3")), "data"),
        (raising(StorageError("cannot write s3://bucket/file: refused")), "storage"),
        (raising(CheckpointError("step-00000050 has no optimizer")), "checkpoint"),
        (raising(IntegrityError("model.safetensors differs from its checksum")), "checkpoint"),
        (raising(TrainingError("the prepared data changed")), "config"),
        (raising(Diverged("the loss is nan at step 7")), "diverged"),
    ],
)
def test_what_a_worker_raised_on_purpose_keeps_type_and_message(raises: Callable[[], Any], kind: str) -> None:
    failure = told(raises)
    found = fault(RuntimeError(RESET), failure)
    assert found.kind == kind
    assert type(found.error) is type(failure.failure.error) and str(found.error) == failure.failure.links[0].message
    assert str(found.error) in found.cause and "rank 1" in found.cause


def test_a_missing_shard_is_a_data_error(tmp_path: Path) -> None:
    from raymodels.data.shards import Entry, local

    entry = Entry(file="train-00000.bin", tokens=1, documents=1, bytes=10, sha256="")
    found = fault(None, told(lambda: local(str(tmp_path), [entry], tmp_path)))
    assert found.kind == "data" and "train-00000.bin is missing" in found.cause and not found.retry


@pytest.mark.parametrize(
    ("raises", "kind"),
    [
        (lambda: torch.empty(10**15), "out_of_memory_host"),
        (lambda: bytearray(10**15), "out_of_memory_host"),
        (raising(OSError(errno.ENOMEM, "Cannot allocate memory")), "out_of_memory_host"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), "out_of_memory_device"),
        (raising(torch.AcceleratorError("CUDA error: out of memory", 2)), "out_of_memory_device"),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), "out_of_memory_device"),
    ],
)
def test_out_of_memory_says_what_to_lower_and_is_not_retried(raises: Callable[[], Any], kind: str) -> None:
    found = fault(RuntimeError(CLOSED), told(raises))
    assert (found.kind, found.retry) == (kind, False)
    assert "train.micro_batch" in found.remedy and "train.activation_checkpointing" in found.remedy
    assert fault(told(raises), out_of_memory=1).retry
    advised = found.advised("the planner says 3 GB")
    assert advised.remedy == f"{found.remedy}; the planner says 3 GB"
    assert str(advised.error) == f"{found.cause}. {advised.remedy}."


def test_rays_memory_monitor() -> None:
    full = ray_errors.OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.")
    found = fault(RuntimeError(RESET), train_errors.WorkerHealthCheckFailedError(INFO, full))
    assert found.kind == "out_of_memory_host" and "rank 1 on node-7" in found.cause


def test_a_killed_worker_is_told_from_a_lost_node() -> None:
    killed = fault(RuntimeError(CLOSED), died())
    assert (killed.kind, killed.retry) == ("worker_killed", True)
    assert "the process of rank 1 on node-7 (node 36f7a9fcc861, pid 15107) died" in killed.cause
    assert fault(RuntimeError(CLOSED), died(), evidence=Evidence(nodes_lost=(OTHER_NODE,))).kind == "worker_killed"
    for lost in (
        fault(RuntimeError(CLOSED), died(), evidence=Evidence(nodes_lost=(NODE,))),
        fault(RuntimeError(CLOSED), died("The actor died because its node has died. Node Id: 36f7")),
        fault(RuntimeError(CLOSED), died("is unavailable", kind=ray_errors.ActorUnavailableError)),
    ):
        assert (lost.kind, lost.retry) == ("lost_node", True)
        assert "the node of rank 1 on node-7" in lost.cause


def test_only_the_survivors_were_heard() -> None:
    failures = [told(raising(RuntimeError(text)), rank) for rank, text in enumerate([CLOSED, RESET])]
    alone = fault(*failures)
    assert alone.kind == "worker_killed" and "rank 0" in alone.cause and "lost contact" in alone.cause
    node = fault(*failures, evidence=Evidence(nodes_lost=(NODE,)))
    assert node.kind == "lost_node" and "36f7a9fcc861 died" in node.cause
    waited = fault(told(raising(RuntimeError(TIMED_OUT)), 0))
    assert (waited.kind, waited.retry) == ("hang", True) and "waited too long in a collective" in waited.cause


def test_what_breaks_for_want_of_a_rank_is_no_bug() -> None:
    def closing() -> None:
        try:
            raise RuntimeError(CLOSED)
        finally:
            missing_key()

    assert fault(told(closing, 0), died()).kind == "worker_killed"


def test_torchs_other_words_in_a_collective_count_only_where_a_rank_is_gone() -> None:
    def collective() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            dist.all_gather([torch.ones(2)], torch.ones(3))
        finally:
            dist.destroy_process_group()

    failure = told(collective, 0)
    assert fault(failure, None).kind == "user_bug"
    assert fault(failure, died()).kind == "worker_killed"


def test_preemption_by_notice_and_by_death() -> None:
    notice = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={NODE: [0, 1]}))
    found = classify(notice, Evidence(), RetryConfig(), Counter(preemption=1000))
    assert (found.kind, found.retry) == ("preemption", True)
    assert "36f7a9fcc861" in found.cause and "rank 0, 1" in found.cause
    assert fault(RuntimeError(RESET), died(preempted=True)).kind == "preemption"
    assert not classify(notice, Evidence(), RetryConfig(preemption=0), Counter()).retry


def verdict() -> Evidence:
    return Evidence(
        verdict=Verdict(
            rank=1,
            host="node-7",
            node=NODE,
            pid=15107,
            kind="its process is stopped",
            phase="step",
            step=40,
            seconds=11.0,
            stack='File "loop.py", line 3, in wait',
            others={0: "all_reduce (distributed_c10d.py:3252)"},
        )
    )


def test_a_hang_that_the_watch_ended_is_no_killed_worker_but_a_bug_stays_a_bug() -> None:
    found = fault(RuntimeError(CLOSED), died(), evidence=verdict())
    assert (found.kind, found.retry) == ("hang", True)
    assert found.cause == verdict().verdict.sentence
    assert "in wait" in found.trace and "rank 0 stood at all_reduce" in found.trace
    assert fault(told(missing_key, 0), died(), evidence=verdict()).kind == "user_bug"
    assert fault(None, train_errors.WorkerHealthCheckTimeoutError(INFO)).kind == "hang"


def test_storage_that_refuses_is_not_tried_again(tmp_path: Path) -> None:
    full = fault(None, told(lambda: storage.append("/dev/full", b"x" * 100_000)))
    assert (full.kind, full.retry) == ("storage", True) and "Free space" in full.remedy and "/dev/full" in full.cause
    plain = fault(None, told(lambda: Path("/dev/full").write_bytes(b"x")))
    assert plain.kind == "storage" and "Free space" in plain.remedy
    refused = fault(None, told(lambda: storage.write_bytes("/sys/raymodels", b"x")), storage="always")
    assert (refused.kind, refused.retry) == ("storage", False) and "right to read and write" in refused.remedy


def test_faults_of_the_controller_and_of_the_driver() -> None:
    late = classify(
        ControllerError(train_errors.WorkerGroupStartupTimeoutError(4)), Evidence(), RetryConfig(), Counter()
    )
    assert (late.kind, late.retry) == ("lost_node", True)
    room = ClusterError("the cluster has room for 1 of 2 workers: add nodes")
    found = classify(room, Evidence(), RetryConfig(), Counter())
    assert (found.kind, found.retry, found.error) == ("config", False, room)
    strange = classify(ray_errors.RaySystemError("what"), Evidence(), RetryConfig(), Counter())
    assert (strange.kind, strange.retry) == ("unknown", False)


def test_retries_are_counted_by_class() -> None:
    assert fault(died(), happened={"worker_killed": 2, "hang": 9}).retry
    assert not fault(died(), happened={"worker_killed": 3}).retry
    assert fault(died(), happened={"worker_killed": 99}, worker_killed="always").retry
    assert not fault(died(), worker_killed=0).retry


def test_a_diverged_loss_is_retried_only_to_go_back() -> None:
    assert fault(told(raising(Diverged("grows", 40, (50, 60))))).retry
    assert not fault(told(raising(Diverged("grows")))).retry


def test_every_kind_has_its_remedy() -> None:
    assert set(REMEDIES) == set(PRECEDENCE) - {"waited", "lost_contact"}


def test_the_log_holds_cause_remedy_and_every_ranks_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fault(RuntimeError(CLOSED), told(missing_key))
    write_log(str(tmp_path), 3, found)
    log = (tmp_path / "log" / "attempt-3.txt").read_text()
    assert log.startswith(f"user_bug\ncause: {found.cause}\nremedy: {found.remedy}\nretry: False\n")
    assert CLOSED in log and "in missing_key" in log
    write_log("/dev/null/run", 3, found)
    assert found.cause in capsys.readouterr().err
