"""Ray Train's controller, in a process that serves all attempts of a run.

A controller takes about as long to start as the workers: its process, all that it imports, and another process that
frees the workers' resources should the controller die. Ray Train's own restarts keep both, and so does `Kept`.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, ClassVar, Self

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

END_S = 10.0


class Cleaner(PlacementGroupCleanerCallback):  # type: ignore[misc]
    """Ray Train's, of which the actor stays for the controller of the next attempt, as long as their process does."""

    _cleaner: Any
    _kept: ClassVar[Any] = None

    def after_controller_start(self, train_run_context: Any) -> None:
        if Cleaner._kept is None:
            super().after_controller_start(train_run_context)
            Cleaner._kept = self._cleaner
        self._cleaner = Cleaner._kept
        self._controller_actor_id = ray.get_runtime_context().get_actor_id()

    async def before_controller_shutdown(self) -> None:
        """Leaves it running."""

    @classmethod
    def stop(cls) -> None:
        if cls._kept is not None:
            ray.get(cls._kept.stop.remote(), timeout=END_S)


class Controller(TrainController):  # type: ignore[misc]
    def again(self, **settings: Any) -> None:
        """Become the controller of another attempt."""
        self.__init__(**settings)  # type: ignore[misc]

    def end(self) -> None:
        Cleaner.stop()


class Kept:
    """The controllers' process, from a run's first attempt to its end. Used as a context manager."""

    def __init__(self) -> None:
        self._actor: Any = None

    def controller(self, settings: dict[str, Any]) -> Any:
        """A controller for an attempt, whose ``settings`` are Ray Train's; in a new process if the last has died."""
        if self._actor is not None:
            with suppress(RayActorError):
                ray.get(self._actor.again.remote(**settings))
                return self._actor
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        env = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **get_env_vars_to_propagate()}
        options = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": env}}
        self._actor = ray.remote(**options)(Controller).remote(**settings)
        return self._actor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._actor is not None and ray.is_initialized():  # else the cluster was lost, or left by Ctrl-C
            with suppress(RayActorError, GetTimeoutError):
                ray.get(self._actor.end.remote(), timeout=2 * END_S)
            ray.kill(self._actor)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, with a controller that is kept, and without a process for Ray Data's datasets, as it has none."""

    def __init__(self, kept: Kept, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._kept = kept

    def _create_default_callbacks(self) -> list[Any]:
        kept = [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]
        return [Cleaner() if isinstance(each, PlacementGroupCleanerCallback) else each for each in kept]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        controller = self._kept.controller(settings)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
