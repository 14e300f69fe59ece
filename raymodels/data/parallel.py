"""Run one function over many items: on Ray Data where this process is connected to a cluster, else on its own cores."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from raymodels.errors import RaymodelsError
from raymodels.niceness import give_way

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in no particular order. The first error of ``work`` ends the run and is raised here."""
    ray = sys.modules.get("ray")  # whoever has a cluster has imported ray already
    if ray is not None and ray.is_initialized():
        return _on_ray(work, items)
    processes = min(len(os.sched_getaffinity(0)), len(items))
    return _on_processes(work, items, processes) if processes > 1 else map(work, items)


def _on_processes(work: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # once the units at work are done, nobody writes any more
            raise


def _start_worker() -> None:
    give_way()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a traceback of its own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process


def _on_ray(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    import ray.data

    def call(row: dict[str, Any]) -> dict[str, Any]:
        give_way()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            return {"result": pickle.dumps(work(pickle.loads(row["item"])))}
        except RaymodelsError as error:  # through Ray it would arrive wrapped in Ray's own error
            return {"result": pickle.dumps(error)}

    dataset = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for row in dataset.map(call).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, RaymodelsError):
            raise result
        yield result
