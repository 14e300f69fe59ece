"""One attempt of a run: a Ray Train worker group from its start to its end, watched over.

Its size is settled before it starts. Ray Train's own elastic resizing kills the workers in the midst of a step, and
counts on nodes that have died; here they are asked to save and leave, and the next attempt has another size.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from raymodels import cluster, storage
from raymodels.config import Config, dump
from raymodels.errors import StorageError
from raymodels.train import signals
from raymodels.train.controller import Kept, Trainer
from raymodels.train.events import Event
from raymodels.train.relay import relay
from raymodels.train.verdict import Verdict
from raymodels.train.watch import watch
from raymodels.train.worker import work

GROWTH_POLL_S = 2.0
ASK_AGAIN_S = 1.0
FIRST_LOOK_S = 20.0
# Ray Train looks at its workers every two seconds by default. They cannot report more often than that, and a dead one
# is found no sooner.
POLL_S = "0.5"


@dataclass
class Evidence:
    """What was seen from outside while an attempt ran."""

    verdict: Verdict | None = None
    nodes_lost: tuple[str, ...] = ()
    committed: bool = False
    """Whether it has saved anything."""


def run_attempt(
    config: Config,
    prepared: str,
    number: int,
    history: dict[str, Any],
    on_event: Callable[[Event], None],
    evidence: Evidence,
    kept: Kept,
    *,
    evaluate_only: bool = False,
) -> Event:
    """Run the workers to their end; returns everything they reported, later values over earlier ones.

    Args:
        prepared: the place of the prepared dataset.
        history: ``failures`` and ``seconds`` of the run before this attempt, and when it ``started`` (unix seconds).
        evidence: is filled in while the attempt runs.
        kept: what is kept of Ray Train from one attempt to the next.

    Raises:
        Exception: what Ray Train raises when a worker fails.
        KeyboardInterrupt: Ctrl-C; the workers have been ended.
    """
    cluster.connect()
    merged: Event = {}

    def on_report(report: Event) -> None:
        merged.update(report)
        evidence.committed |= any(not save["error"] for save in report.get("saves", ()))
        _tell(report, on_event)

    def on_verdict(verdict: Verdict) -> None:
        evidence.verdict = verdict
        on_event({"kind": "notice", "text": verdict.sentence})

    def on_slow(slow: Any) -> None:
        on_event({"kind": "notice", "text": slow.sentence})

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    before = cluster.alive_nodes()
    with (
        cluster.asking_for(config.workers),
        relay(on_report) as callback,
        watch(on_verdict, on_slow, first_look_s=FIRST_LOOK_S) as beats,
        _leaving_on_sigterm(config.place, number),
        nullcontext() if evaluate_only else _growing(config, number, merged, on_event),
    ):
        size = cluster.wait_for_room(config.workers, lambda text: on_event({"kind": "notice", "text": text}))
        job = {"config": dump(config), "prepared": prepared, "attempt": number, "beats": beats, **history}
        job |= {"evaluate_only": evaluate_only}
        try:
            _trainer(config, size, job, callback, kept).fit()
        except SystemExit as error:  # how Ray Train's own handler of Ctrl-C leaves, having ended the workers
            raise KeyboardInterrupt from error
        except Exception:
            evidence.nodes_lost = tuple(sorted(before - cluster.settled_nodes()))
            raise
    return merged


def _trainer(config: Config, size: int, job: dict[str, Any], callback: Any, kept: Kept) -> Trainer:
    workers = config.workers
    return Trainer(
        kept,
        work,
        train_loop_config=job,
        torch_config=TorchConfig(
            backend="nccl" if workers.gpus else "gloo", timeout_s=int(workers.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, "GPU": workers.gpus},
        ),
        run_config=RunConfig(
            name=f"start-{int(time.time() * 1000)}",  # ours resumes, not Ray's
            storage_path=storage.join(config.place, "ray"),
            failure_config=FailureConfig(max_failures=0),  # what to try again is for the driver to say
            callbacks=[callback],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _tell(report: Event, on_event: Callable[[Event], None]) -> None:
    for text in report.pop("warnings"):
        on_event({"kind": "notice", "text": text})
    for save in report.pop("saves", ()):
        if save["error"]:
            text = f"the checkpoint after step {save['step']} was not saved: {save['error']}; training goes on"
            on_event({"kind": "notice", "text": text})
        else:
            on_event({"kind": "saved", "step": save["step"], "seconds": save["seconds"], "bytes": save["bytes"]})
    on_event({"kind": "report", **report})


@contextmanager
def _leaving_on_sigterm(run: str, number: int) -> Iterator[None]:
    """While in here SIGTERM asks the workers to save and leave. Only the main thread can listen to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=_ask, args=(run, number, "terminated"), daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _growing(config: Config, number: int, merged: Event, on_event: Callable[[Event], None]) -> Iterator[None]:
    """While in here the workers are asked to leave when there has been room for more of them for a while."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch_room, args=(config, number, merged, on_event, over), daemon=True)
    if config.workers.least < config.workers.most:
        watcher.start()
    try:
        yield
    finally:
        over.set()


def _watch_room(
    config: Config, number: int, merged: Event, on_event: Callable[[Event], None], over: threading.Event
) -> None:
    since = time.monotonic()
    while not over.wait(GROWTH_POLL_S):
        size: int = merged.get("world_size", config.workers.most)  # known from the first step on
        more = min(config.workers.most - size, cluster.free(config.workers))
        if more <= 0:
            since = time.monotonic()
        elif time.monotonic() - since >= config.workers.resize_after_s:
            on_event({"kind": "notice", "text": f"there is room for {size + more} workers, not just {size}: growing"})
            _ask(config.place, number, "resized")
            return


def _ask(run: str, number: int, reason: signals.Reason) -> None:
    """Ask the workers to save and leave, as soon as storage takes the word."""
    while True:
        try:
            signals.request(run, number, reason)
            return
        except StorageError:
            time.sleep(ASK_AGAIN_S)
