"""An endpoint in this process: the gateway over HTTP and real replicas, with everything but Ray between them."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvicorn
from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.registry import Registry
from raymodels.serve.gateway import Gateway, app
from raymodels.serve.replica import Replica
from raymodels.serve.routing import Route


class LocalStream:
    """What a streaming call of a handle returns."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._items = items
        self._closing: asyncio.Task[None] | None = None
        self._replica_result_future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._items.aclose())


class LocalHandle:
    """A handle to a replica in this process: a call returns what a Ray Serve handle's does, a task or a stream."""

    def __init__(self, replica: Any, stream: bool = False) -> None:
        self._replica, self._stream = replica, stream

    def options(self, stream: bool = False, **_: Any) -> LocalHandle:
        return LocalHandle(self._replica, stream)

    def __getattr__(self, method: str) -> Any:
        call, wrap = getattr(self._replica, method), LocalStream if self._stream else asyncio.ensure_future
        # Sent as to another process.
        return SimpleNamespace(remote=lambda *args: wrap(call(*pickle.loads(pickle.dumps(args)))))


@contextmanager
def endpoint(
    folder: Path,
    models: dict[str, Path],
    engine: EngineConfig,
    adapters: dict[str, dict[str, Path]] | None = None,
    **http: Any,
) -> Iterator[str]:
    """Serves model directories, and by model the folders of adapters over it, under their names; gives the URL."""
    registry = Registry(str(folder / "registry"))
    replicas = {}
    for name, model_dir in models.items():
        registry.publish(name, str(model_dir), {})
        sources = {adapter: str(source) for adapter, source in (adapters or {}).get(name, {}).items()}
        replicas[f"{name}--v1"] = Replica(registry.place, f"{name}@1", engine, threads=1, adapters=sources)
    table = {name: Route({f"{name}--v1": 1.0}) for name in models}
    for name, over in (adapters or {}).items():
        table |= dict.fromkeys(over, Route({f"{name}--v1": 1.0}, parent=name))
    handles = {name: LocalHandle(replica) for name, replica in replicas.items()}
    context = SimpleNamespace(servable_object=None, replica_tag="here")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))

    async def run() -> None:
        kind = Gateway.func_or_class.__mro__[1]  # the class itself, under what Ray Serve wraps around it
        context.servable_object = kind(
            HttpConfig(ingress="proxy", **http), table, handles, dict.fromkeys(handles, engine)
        )
        await server.serve([listening])
        await context.servable_object._bodies.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="endpoint")
    with (
        mock.patch.object(serve, "get_replica_context", lambda: context),
        mock.patch.object(serve, "status", lambda: serve_status(list(replicas))),
    ):
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    for replica in replicas.values():
        replica._engine.close()


def serve_status(names: list[str]) -> Any:
    """The status of a Serve in which these models have a replica each."""
    state = SimpleNamespace(replica_states={"RUNNING": 1}, status_trigger="CONFIG_UPDATE_COMPLETED")
    return SimpleNamespace(applications={name: SimpleNamespace(deployments={name: state}) for name in names})
