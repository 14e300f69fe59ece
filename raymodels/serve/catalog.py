"""What is known of the models in the routing table, for lists of them. Asking starts no replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from raymodels.serve.capacity import Capacity
from raymodels.serve.replica import Description
from raymodels.serve.routing import Routes
from raymodels.serve.schema import Refused


class Catalog:
    """
    Args:
        changed: called when the replicas were found to be others.
    """

    def __init__(self, routes: Routes, capacity: Capacity, changed: Callable[[], None]) -> None:
        self._routes = routes
        self._capacity = capacity
        self._changed = changed
        self._described: dict[str, Description] = {}

    def clear(self) -> None:
        """Forget what names led to before the table changed."""
        self._described.clear()

    async def descriptions(
        self, models: Iterable[str], deadline: float, max_age_s: float
    ) -> dict[str, Description | None]:
        """What serves the models that are still there; of one without a replica the last answer, if there was one.

        Args:
            max_age_s: how old may be what is known of the replicas.
        """
        if await self._capacity.look(max_age_s):
            self._changed()
        await asyncio.gather(*(self._ask(model, deadline) for model in models if self._capacity.running(model)))
        return {model: self._described.get(model) for model in models if model in self._routes.table}

    def listed(self, model: str, about: Description | None) -> dict[str, Any]:
        """An entry of ``GET /v1/models``."""
        return {
            "id": model,
            "object": "model",
            "created": about.published_unix_seconds if about else 0,
            "owned_by": "raymodels",
            "root": about.reference if about else None,
            "parent": self._routes.table[model].parent,
            "max_model_len": about.context if about else None,
            "has_chat_template": about.has_chat_template if about else None,
        }

    async def _ask(self, model: str, deadline: float) -> None:
        route = self._routes.table.get(model)
        with contextlib.suppress(Refused):
            about = await self._routes.describe(model, deadline)
            if self._routes.table.get(model) is route:  # else it is of what the name led to before
                self._described[model] = about
