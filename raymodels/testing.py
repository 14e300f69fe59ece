"""Run a function on several gloo ranks of this machine, without Ray: for tests and benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from raymodels.config import Config

PRELOAD = ["raymodels.train.loop", "transformers.models.llama.modeling_llama"]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes that form a process group; the results by rank.

    Args:
        function: importable by name; the processes are forked from a server that has imported torch and DeepSpeed once.

    Raises:
        AssertionError: some rank raised; carries its traceback.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the server imports DeepSpeed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, pipe[1], function, args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, writer) in zip(ranks, pipes, strict=True):
            process.start()
            writer.close()
        outcomes = [_outcome(reader) for reader, _ in pipes]
        for process in ranks:
            process.join()
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    assert not failed, "\n".join(failed)
    return [result for _, result in outcomes]


def train_here(config: Config, prepared: str, until: int | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Train on this rank: the run's `raymodels.train.loop.Session` and all its reports.

    Args:
        until: give up after this many steps, as if the process died there, but with the last save finished.
    """
    from raymodels.train import loop
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.signals import Signals

    class Died(Exception):
        pass

    reports: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any]) -> None:
        reports.append(metrics)
        if metrics["step"] == until:
            raise Died

    phases = Phases()
    session = loop.open_session(config, prepared, phases, lambda text: warnings.warn(text, stacklevel=2))
    interval = Interval(config.checkpoint.every, int(os.environ["WORLD_SIZE"]), 0, 0.0, time.monotonic())
    with suppress(Died), Signals(config.place, 1) as signals:
        loop.train(session, phases, report, signals, interval)
    session.saver.wait()
    return session, reports


def _outcome(reader: Connection) -> tuple[str, Any]:
    try:
        text, result = pickle.loads(reader.recv_bytes())
        return text, result
    except EOFError:
        return "the process died", None


def _rank(
    rank: int, world_size: int, folder: str, writer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        outcome = ("", function(*args))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    writer.send_bytes(
        pickle.dumps(outcome)
    )  # plain bytes: torch's own pickling shares memory that dies with this process
    dist.destroy_process_group()
