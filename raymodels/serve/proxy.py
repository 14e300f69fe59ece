"""What Ray Serve's proxies are given of ours: our HTTP connections in the place of uvicorn's.

Serve builds the uvicorn of a proxy itself and passes on no bound of it. But before that, a proxy calls what an
environment variable names. Private names, seen in Ray 2.60 and uvicorn 0.54: that variable,
`uvicorn.config.HTTP_PROTOCOLS`, and the arguments with which uvicorn makes a protocol.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.server import ServerState

from raymodels.serve.connection import Connection
from raymodels.serve.connections import MAX_CONNECTIONS, Connections

IN_PROXIES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.bound_connections"}
"""The environment of Serve's controller, which its proxies inherit, or of every node."""


class ProxyConnection(Connection):
    """A connection as uvicorn makes it, which has accepted it already and knows of no place to make room in."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: Any, _loop: Any = None) -> None:
        connections = vars(server_state).setdefault("raymodels", Connections(MAX_CONNECTIONS))
        connections.tasks = server_state.tasks
        super().__init__(config.loaded_app, connections, root_path=config.root_path)
        self._state = server_state

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        super().connection_made(transport)
        if not self._connections.make_room():
            self.turn_away()
            return
        self._connections.add(self)
        self._state.connections.add(self)  # type: ignore[arg-type]

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._state.connections.discard(self)


def bound_connections() -> list[Any]:
    """Called by every proxy as it starts; it asks for Starlette middleware, of which there is none."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{ProxyConnection.__name__}"
    return []
