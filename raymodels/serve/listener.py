"""The gateway's own HTTP port, for `http.ingress: direct`: what Ray Serve's proxy does otherwise, one hop less."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymodels.errors import ServeError
from raymodels.serve.connection import FULL, Connection, last_words
from raymodels.serve.connections import MAX_CONNECTIONS, Connections
from raymodels.serve.http_limits import MAX_HEAD
from raymodels.serve.tls import Certificate

log = logging.getLogger(__name__)

BACKLOG = 1024
HANDSHAKE_S = 10.0
DRAIN_S = 15
"""For requests in flight when the gateway is replaced; Ray Serve ends it after 20 seconds."""
POLL_S = 0.05
NO_FILES_S = 1.0
"""How long no connection is taken once this process has no files left."""


class Listener:
    """Answers on a port from now on: https with a certificate, else http.

    Args:
        port: bound.
        max_connections: at once; one that waits for its client makes room for a new one.
    """

    def __init__(
        self,
        app: ASGIApp,
        port: socket.socket,
        certificate: Certificate | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._app, self._port = Leaving(app), port
        self._tls = certificate.context if certificate else None
        self._connections = Connections(max_connections)
        self._greeting: set[asyncio.Task[None]] = set()
        self._ended = False
        port.setblocking(False)
        port.listen(BACKLOG)
        self._listen()
        loop = asyncio.get_running_loop()
        self._renewing = loop.create_task(certificate.watch()) if certificate else None

    async def drain(self) -> None:
        """Take no more connections, and wait for the requests in flight."""
        self._ended = True
        asyncio.get_running_loop().remove_reader(self._port)
        self._port.close()
        for connection in list(self._connections.open):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._connections.open or self._connections.tasks:
                    await asyncio.sleep(POLL_S)
        for task in self._connections.tasks:
            task.cancel()
        if self._renewing:
            self._renewing.cancel()

    def _listen(self) -> None:
        if not self._ended:
            asyncio.get_running_loop().add_reader(self._port, self._accept)

    def _accept(self) -> None:
        """Take one connection; called again while there is another."""
        try:
            accepted, address = self._port.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no more files may be open
            log.error("cannot take a connection: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._port)
            loop.call_later(NO_FILES_S, self._listen)
            return
        if not self._connections.make_room():
            self._turn_away(accepted)
            return
        accepted.setblocking(False)
        connection = Connection(self._app, self._connections, str(address[0]))
        self._connections.add(connection)
        task = asyncio.get_running_loop().create_task(self._greet(accepted, connection))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _greet(self, accepted: socket.socket, connection: Connection) -> None:
        """Make the connection, with its TLS handshake."""
        if connection.gone:
            self._connections.remove(connection)
            accepted.close()
            return
        connection.opening = asyncio.current_task()
        loop, wait_s = asyncio.get_running_loop(), HANDSHAKE_S if self._tls else None
        try:
            await loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=wait_s
            )
        except (OSError, asyncio.CancelledError) as error:
            self._connections.remove(connection)
            log.debug("a client at %s has not come to a connection: %r", connection.address, error)

    def _turn_away(self, accepted: socket.socket) -> None:
        """All connections wait for answers: say so, as far as that can be said at once."""
        with contextlib.suppress(OSError), accepted:
            accepted.setblocking(False)
            if self._tls is None:
                with contextlib.suppress(BlockingIOError):
                    accepted.recv(MAX_HEAD)  # what is left unread takes the answer away again
                accepted.send(last_words(FULL))


def shared_port(host: str, port: int) -> socket.socket:
    """A port that several gateways of one machine can have: each new connection goes to one of those that listen.

    Raises:
        ServeError: something else has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServeError(f"http.port: cannot listen on {host}:{port}: {error.strerror}") from error
    return bound


class Leaving:
    """Middleware that cancels a request whose client has gone, as Ray Serve's proxy does; ASGI only tells of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        watching: asyncio.Task[None] | None = None

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set_result(None)
            answering.cancel()

        async def receiving() -> Message:
            nonlocal watching
            if watching is not None:
                await gone
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watching = loop.create_task(watch())
            return message

        async def sending(message: Message) -> None:
            # After the end of the answer ASGI says that the client has gone, whether or not it has.
            if watching and message["type"] == "http.response.body" and not message.get("more_body", False):
                watching.cancel()
            await send(message)

        async def answer() -> None:
            await self._app(scope, receiving, sending)

        answering = loop.create_task(answer())
        try:
            await answering
        except asyncio.CancelledError:
            answering.cancel()
            if not gone.done():
                raise
        finally:
            if watching:
                watching.cancel()
