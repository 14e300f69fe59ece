"""Which replicas each model has, why it has none, and how much work there is room for as they come and go."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.fair_queue import Room
from raymodels.serve.metrics import replicas_changed, replicas_gone
from raymodels.serve.routing import Route

log = logging.getLogger(__name__)

POLL_S = 2.0
UNREADY_S = 0.5
"""How old an answer may be that a model has no replica, where one is about to start."""
RAISED = re.compile(r"^([A-Za-z_][\w.]*): (.+)", re.MULTILINE)
"""An exception at the end of a traceback."""
OURS = "raymodels.errors."


@dataclass(frozen=True)
class Replicas:
    """Those of one deployment: how many run, what changed their number, and why none starts, if Serve says so."""

    running: int
    trigger: str
    failure: str | None = None


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
        self._replicas: dict[str, Replicas] = {}
        self._shown: dict[str, int] = {}
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf

    def room(self, model: str) -> Room:
        """This gateway's part of what the model's replicas hold."""
        running = waiting = 0.0
        ahead, reserve = (0.0, self._http.reserve) if self._http.keys_file else (self._http.work_ahead, 0.0)
        for application in self._table[model].applications:
            engine = self._engines.get(application, EngineConfig())
            replicas = max(1, self._running(application))
            running += replicas * engine.max_batch * (1 + ahead)
            waiting += replicas * engine.max_queue
        gateways = self._http.gateway_replicas
        tokens = math.ceil(self._http.max_queue_tokens / gateways)
        places = math.ceil(running / gateways)
        return Room(places, math.ceil(waiting / gateways), tokens, reserved=min(places - 1, round(places * reserve)))

    def running(self, model: str) -> int:
        """Replicas of the model that run, as far as is known."""
        return sum(self._running(application) for application in self._applications(model))

    def failure(self, model: str) -> str | None:
        """Why the replicas of a model do not start; none if one runs, or Serve has not given up hope yet."""
        if self.running(model):
            return None
        known = [self._replicas.get(application) for application in self._applications(model)]
        return next((replicas.failure for replicas in known if replicas and replicas.failure), None)

    async def unready(self, changed: Callable[[], None]) -> list[str]:
        """Model names without a running replica, as `watch` last saw; waits only where there was no look yet.

        As long as there are some it is looked again, at most every `UNREADY_S`, however many ask.
        """
        for max_age_s in (math.inf, UNREADY_S):
            if await self.look(max_age_s):
                changed()
            if not (unready := sorted(model for model in self._table if not self.running(model))):
                break
        return unready

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follow the replicas until cancelled; calls ``changed`` when their numbers are others."""
        while True:
            if await self.look():
                changed()
            await asyncio.sleep(POLL_S)

    async def look(self, max_age_s: float = 0.0) -> bool:
        """Ask Serve for the replicas unless that was done so shortly before; whether anything is new.

        However many wait for it, one asks.
        """
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._looked_at < max_age_s:
                return False
            self._looked_at = now
            try:
                return self.update(deployments(await asyncio.to_thread(serve.status)))
            except Exception as error:
                log.warning("cannot tell how many replicas there are, the last numbers stay in force: %s", error)
                return False

    def update(self, found: Mapping[str, Replicas]) -> bool:
        """Take over the replicas of every deployment; whether anything is new."""
        before, self._replicas = self._replicas, dict(found)
        for model in self._shown.keys() - self._table.keys():
            replicas_gone(model)
            del self._shown[model]
        for model, route in self._table.items():
            if route.parent is not None:
                continue  # its base's replicas are counted as the base's
            replicas = self.running(model)
            if replicas != self._shown.get(model):
                reasons = [found[application].trigger for application in route.applications if application in found]
                replicas_changed(model, replicas, reasons[0] if reasons else "GONE")
                self._shown[model] = replicas
        return self._replicas != before

    def _applications(self, model: str) -> Iterable[str]:
        return self._table[model].applications if model in self._table else ()

    def _running(self, application: str) -> int:
        return self._replicas[application].running if application in self._replicas else 0


def deployments(status: Any) -> dict[str, Replicas]:
    """Every deployment's replicas, from Serve's status; under its application's name too, if it is alone in that."""
    found: dict[str, Replicas] = {}
    for application, about in status.applications.items():
        for name, state in about.deployments.items():
            found[name] = _replicas(state)
        if len(about.deployments) == 1:
            found[application] = found[name]
    return found


def cannot_start(state: Any) -> bool:
    """Whether Serve says of a deployment that its replicas failed to start several times in a row; it may try on."""
    return bool(state.status_trigger == "REPLICA_STARTUP_FAILED")


def _replicas(state: Any) -> Replicas:
    trigger = str(getattr(state.status_trigger, "value", state.status_trigger))
    failure = cause(state.message) if cannot_start(state) else None
    return Replicas(state.replica_states.get("RUNNING", 0), trigger, failure)


def cause(message: str) -> str:
    """The exception in a message of Serve's, which holds its traceback too; of our own errors the text alone."""
    raised = RAISED.findall(message)
    if not raised:
        return message.strip()
    kind, text = raised[-1]
    return str(text) if kind.startswith(OURS) else f"{kind.rpartition('.')[2]}: {text}"
