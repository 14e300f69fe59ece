"""One HTTP request and its answer, as an ASGI application sees them."""

from __future__ import annotations

import asyncio
import functools
import http
import logging
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import h11
from starlette.types import ASGIApp, Message, Scope

if TYPE_CHECKING:
    from raymodels.serve.connection import Connection

log = logging.getLogger(__name__)

MAX_UNREAD = 64 << 10
"""Bytes of a body that the application has not taken yet, over which no more are read."""
CLOSE = (b"connection", b"close")


class Exchange:
    """A request that has begun to arrive on a connection."""

    def __init__(self, connection: Connection, scope: Scope, waits_for_continue: bool) -> None:
        self._connection = connection
        self._scope = scope
        self._waits_for_continue = waits_for_continue
        self._body = bytearray()
        self._news = asyncio.Event()
        self._head = b""
        self.received = False
        """Whether the whole request is there."""
        self.begun = False
        """Whether the answer has begun."""
        self.answered = False
        self.ended = False
        """Whether nobody takes the answer any more."""

    async def run(self, app: ASGIApp) -> None:
        """Have the request answered. An application that fails, or says nothing, is answered 500 for."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as error:
            log.error("the application failed", exc_info=error)
        finally:
            if not self.answered and not self.ended:
                self._connection.fail()

    def got(self, data: bytes | bytearray) -> bool:
        """Take a piece of the body; false once there is as much of it as may wait here."""
        if self.answered:
            return True  # and throw it away
        self._body += data
        self._news.set()
        return len(self._body) <= MAX_UNREAD

    def whole(self) -> None:
        """The request is complete."""
        self.received = True
        self._news.set()

    def end(self) -> None:
        """Tell the application that its client has gone."""
        self.ended = True
        self._news.set()

    async def receive(self) -> Message:
        """ASGI's receive."""
        if self._waits_for_continue and not self.begun and not self.ended:
            self._waits_for_continue = False
            self._connection.inform()
        if not self.ended and not self.answered:
            self._connection.resume_reading()
            await self._news.wait()
            self._news.clear()
        if self.ended or self.answered:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": not self.received}

    async def send(self, message: Message) -> None:
        """ASGI's send; waits while the client does not read."""
        await self._connection.writable.wait()
        if self.ended:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], [(bytes(name), bytes(value)) for name, value in message.get("headers", [])])
        else:
            self._go_on(message.get("body", b""), message.get("more_body", False))

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun, parser = True, self._connection.parser
        closing = [CLOSE] if self._connection.last else []
        response = h11.Response(status_code=status, headers=[date(), *headers, *closing], reason=phrase(status))
        self._head = parser.send(response) or b""
        if not any(name.lower() == b"content-length" for name, _ in headers):
            self._connection.write(self._head)  # a stream, whose first piece may come much later
            self._head = b""

    def _go_on(self, body: bytes, more: bool) -> None:
        parser = self._connection.parser
        data = b"" if self._scope["method"] == "HEAD" else body
        output, self._head = self._head + (parser.send(h11.Data(data=data)) or b""), b""
        if not more:
            output += parser.send(h11.EndOfMessage()) or b""
        self._connection.write(output)
        if not more:
            self.answered = True
            self._news.set()
            self._connection.answered()


def date() -> tuple[bytes, bytes]:
    """The header of that name."""
    return b"date", _date(int(time.time()))


@functools.lru_cache(1)
def _date(unix_seconds: int) -> bytes:
    return formatdate(unix_seconds, usegmt=True).encode()


@functools.cache
def phrase(status: int) -> bytes:
    try:
        return http.HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
