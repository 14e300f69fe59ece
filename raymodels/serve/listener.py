"""The gateway's own HTTP port, for `http.ingress: direct`: what Ray Serve's proxy does otherwise, one hop less."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymodels.errors import ServeError
from raymodels.serve.tls import Certificate

KEEP_ALIVE_S = 90
DRAIN_S = 15
"""For requests in flight when the gateway is replaced; Ray Serve ends it after 20 seconds."""


class Listener:
    """Answers on a port from now on: https with a certificate, else http."""

    def __init__(self, app: ASGIApp, port: socket.socket, certificate: Certificate | None = None) -> None:
        config = uvicorn.Config(
            Leaving(app),
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
            ssl_context_factory=None if certificate is None else lambda _, __: certificate.context,
        )
        self._server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(self._server.serve([port]))
        self._renewing = loop.create_task(certificate.watch()) if certificate else None

    async def drain(self) -> None:
        """Take no more connections, and wait for the requests in flight."""
        self._server.should_exit = True
        await self._serving
        if self._renewing:
            self._renewing.cancel()


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
    """Middleware that cancels a request whose client has gone, as Ray Serve's proxy does; uvicorn only tells of it."""

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
            # After the end of the answer uvicorn says that the client has gone, whether or not it has.
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
