"""How much work each model has room for, as its replicas come and go."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.admission import Room
from raymodels.serve.metrics import replicas_changed
from raymodels.serve.routing import Route

log = logging.getLogger(__name__)

POLL_S = 2.0


class Capacity:
    """The room of every model in a routing table.

    A model without a replica counts as one with one: what is sent there is what starts it.

    Args:
        table: model name -> route; may change.
        engines: application -> the settings of its replicas' engines.
    """

    def __init__(self, http: HttpConfig, table: Mapping[str, Route], engines: Mapping[str, EngineConfig]) -> None:
        self._http = http
        self._table = table
        self._engines = engines
        self._replicas: dict[str, int] = {}
        self._shown: dict[str, int] = {}

    def room(self, model: str) -> Room:
        """This gateway's part of what the model's replicas hold."""
        running = waiting = 0.0
        ahead, reserve = (0.0, self._http.reserve) if self._http.keys_file else (self._http.work_ahead, 0.0)
        for application in self._table[model].applications:
            engine = self._engines.get(application, EngineConfig())
            replicas = max(1, self._replicas.get(application, 1))
            running += replicas * engine.max_batch * (1 + ahead)
            waiting += replicas * engine.max_queue
        gateways = self._http.gateway_replicas
        tokens = math.ceil(self._http.max_queue_tokens / gateways)
        places = math.ceil(running / gateways)
        return Room(places, math.ceil(waiting / gateways), tokens, reserved=min(places - 1, round(places * reserve)))

    def running(self, model: str) -> int:
        """Replicas of the model that run, as far as is known."""
        return self._shown.get(model, 0)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follow the replicas until cancelled; calls ``changed`` when their numbers are others."""
        while True:
            try:
                if self.update(deployments(await asyncio.to_thread(serve.status))):
                    changed()
            except Exception as error:
                log.warning("cannot tell how many replicas there are, the last numbers stay in force: %s", error)
            await asyncio.sleep(POLL_S)

    def update(self, found: Mapping[str, tuple[int, str]]) -> bool:
        """Take over the replicas that run, and why Serve last changed them; whether anything is new."""
        before, self._replicas = self._replicas, {name: replicas for name, (replicas, _) in found.items()}
        for model, route in self._table.items():
            if route.parent is not None:
                continue  # its base's replicas are counted as the base's
            replicas = sum(self._replicas.get(application, 0) for application in route.applications)
            if replicas != self._shown.get(model):
                reasons = [found[application][1] for application in route.applications if application in found]
                replicas_changed(model, replicas, reasons[0] if reasons else "GONE")
                self._shown[model] = replicas
        return self._replicas != before


def deployments(status: Any) -> dict[str, tuple[int, str]]:
    """Every deployment's running replicas and what changed them, from Serve's status."""
    return {
        name: (
            state.replica_states.get("RUNNING", 0),
            str(getattr(state.status_trigger, "value", state.status_trigger)),
        )
        for application in status.applications.values()
        for name, state in application.deployments.items()
    }
