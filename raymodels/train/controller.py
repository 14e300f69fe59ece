"""Ray Train's controller, in a process that serves all attempts of a run.

A controller takes about as long to start as the workers: its process, all that it imports, another process that frees
the workers' resources should the controller die, and one that watches for nodes about to be preempted. Ray Train's own
restarts keep the first two. `Kept` keeps the first, does itself what the second is for, which that can do only where
Ray's dashboard runs, and has the third's work done in the first.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import ray
from ray import PlacementGroupID
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback)


class Controller(TrainController):  # type: ignore[misc]
    def again(self, **settings: Any) -> None:
        """Become the controller of another attempt."""
        self.__init__(**settings)  # type: ignore[misc]


class Noted(WorkerGroupCallback):  # type: ignore[misc]
    """Runs in the controller, on the driver's host: writes into a file which placement group the workers are in."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._file.write_text(group.id.hex())


class Preemption(WorkerGroupCallback):  # type: ignore[misc]
    """Ray Train's watch for nodes about to be preempted, as a thread of the controller's process."""

    def __init__(self) -> None:
        self._watcher: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop()  # a start that fails later on is told of by no hook
        ranks, actors = dict[str, list[int]](), dict[int, Any]()
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        self._watcher = PreemptionWatcher(ranks, worker_actors_by_rank=actors)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._stop()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


class Kept:
    """The controllers' process, from a run's first attempt to its end. Used as a context manager."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._folder = TemporaryDirectory(prefix="raymodels-controller-")
        self.note = Path(self._folder.name) / "placement_group"

    def controller(self, settings: dict[str, Any]) -> Any:
        """A controller for an attempt, whose ``settings`` are Ray Train's; in a new process if the last has died."""
        if self._actor is not None:
            with suppress(RayActorError):
                ray.get(self._actor.again.remote(**settings))
                return self._actor
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        env = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **get_env_vars_to_propagate()}
        env[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"  # `Preemption` does that
        options = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": env}}
        self._actor = ray.remote(**options)(Controller).remote(**settings)
        return self._actor

    def free(self) -> None:
        """Give back what the workers of a controller that died were given, and with it end them."""
        if self.note.exists():
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(self.note.read_text()))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._actor is not None and ray.is_initialized():  # else the cluster was lost, or left by Ctrl-C
            ray.kill(self._actor)
        self._folder.cleanup()


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, with a controller that is kept, and without a process for Ray Data's datasets, as it has none."""

    def __init__(self, kept: Kept, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._kept = kept

    def _create_default_callbacks(self) -> list[Any]:
        own = [each for each in super()._create_default_callbacks() if not isinstance(each, LEFT_OUT)]
        return [*own, Noted(self._kept.note), Preemption()]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        controller = self._kept.controller(settings)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        except RayActorError:
            self._kept.free()
            raise
