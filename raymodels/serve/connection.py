"""HTTP/1.1 and 1.0 on one connection: bounded in size, number and time, whatever the client sends or leaves out.

h11 parses. Of uvicorn's protocols, which do the same between asyncio and ASGI, none bounds how many headers there are,
what stands between the pieces of a body, how long a request takes to arrive or an answer to be read; and both take a
client that has only ended its own side of the connection for one that has gone.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote

import h11
from starlette.types import ASGIApp, Scope

from raymodels.serve.connections import Connections
from raymodels.serve.exchange import CLOSE, Exchange, date, phrase
from raymodels.serve.http_limits import MAX_AHEAD, MAX_HEAD, SLICE, TooMuch, check_framing, check_head
from raymodels.serve.schema import RETRY_AFTER_S, Problem

HEAD_S, KEEP_ALIVE_S = 20.0, 90.0
"""How long the head of a request may take from its first byte, or from the beginning of the connection; how long an
idle connection waits for another request.
"""
LINGER_S = 2.0
"""How long the rest of a request that has been answered is thrown away, so that its client comes to read the answer."""
STALL_S = 60.0
"""How long a client may leave full what was sent to it."""
LOOK_S, MAX_LOOK_S = 0.01, 1.0
"""How soon, and later how often, the kernel is asked whether a client that ended its side has gone altogether."""

ORIGIN = re.compile(rb"https?://[^/?]*", re.IGNORECASE)
TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8
"""Linux's names for: the client has reset the connection; it has ended its side."""

FULL = Problem(
    status=503,
    message="this server has as many connections as it takes: try again later",
    type="server_error",
    code="too_many_connections",
    retry_after_s=RETRY_AFTER_S,
)


class Connection(asyncio.Protocol):
    """One client's connection, whose requests the application answers one after the other.

    Args:
        address: the client's, as far as it is known before the connection is made.
        root_path: ASGI's, put before every path.
    """

    def __init__(self, app: ASGIApp, connections: Connections, address: str = "", root_path: str = "") -> None:
        self._app, self._connections, self._root_path = app, connections, root_path
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._paused = self._deaf = self._probed = False
        self._fed = self._data = 0
        self.address = address
        self.opening: asyncio.Task[Any] | None = None
        """What makes the connection, once it has begun to."""
        self.gone = False
        self.parser = h11.Connection(h11.SERVER, MAX_HEAD)
        self.writable = asyncio.Event()
        self.writable.set()
        self.last = False
        """Whether the request that is being answered is the last one."""

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._within(HEAD_S, self._late)

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.parser.their_state is h11.MUST_CLOSE:  # behind the client's last request
            return
        if self.parser.their_state is h11.IDLE and not self._fed:
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2: some clients send an empty line behind a body
            if data:
                self._within(HEAD_S, self._late)
        for start in range(0, len(data), SLICE):
            piece = data[start : start + SLICE]
            self._fed += len(piece)
            self.parser.receive_data(piece)
            self._handle()
            if self._deaf:
                return
        if self._too_far_ahead():
            self._pause_reading()
            self._watch()

    def eof_received(self) -> bool:
        """The client has ended its side: it may have gone, or wait for its answer. With TLS asyncio closes here."""
        if not self._deaf:
            self.parser.receive_data(b"")
            self._handle()
        answering = self._exchange is not None and self._exchange.received and not self._exchange.answered
        if not answering or self._told("ssl_object") is not None:
            return False
        self._watch()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.remove(self)
        for timer in (self._timer, self._stall, self._look):
            if timer:
                timer.cancel()
        self._deaf = True
        if self._exchange:
            self._exchange.end()
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()
        self._stall = self._loop.call_later(STALL_S, self.evict)

    def resume_writing(self) -> None:
        self.writable.set()
        if self._stall:
            self._stall.cancel()

    # What the exchange and the listener ask for.

    def write(self, data: bytes) -> None:
        if self._transport and not self._transport.is_closing():
            self._transport.write(data)

    def resume_reading(self) -> None:
        if not self._too_far_ahead():
            self._resume()

    def inform(self) -> None:
        """Send 100 Continue, which every client of HTTP/1.1 takes at any time before its answer."""
        self.write(self.parser.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b"")

    def answered(self) -> None:
        """The answer has been sent to its end."""
        exchange, state = self._exchange, self.parser.our_state
        assert exchange
        self._connections.waits(self)
        if self.last or state is not h11.DONE:
            self._close() if exchange.received else self._linger()
        elif exchange.received:
            self._next()
        else:
            self._within(LINGER_S, self._close)
            self._resume()

    def fail(self) -> None:
        """There will be no answer, or no more of it."""
        if self._exchange and not self._exchange.begun:
            self._refuse(Problem(status=500, message="the server failed", type="server_error", code="internal_error"))
        else:
            self.evict()

    def shutdown(self) -> None:
        """Close, after the answer that is under way."""
        self.last = True
        if self._transport is None:
            self.evict()
        elif self._exchange is None or self._exchange.answered:
            self._close()

    def evict(self) -> None:
        """Close now."""
        self.gone = True
        if self._transport:
            self._transport.abort()
        elif self.opening:
            self.opening.cancel()

    def turn_away(self) -> None:
        """Answer before anything was asked that there are too many connections."""
        self._refuse(FULL)

    # Requests.

    def _handle(self) -> None:
        """Take what is whole of what was received."""
        try:
            while not self._deaf and self.parser.their_state is not h11.MUST_CLOSE:
                if self.parser.their_state is h11.IDLE:
                    check_head(self.parser.trailing_data[0])
                event = self.parser.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self._take(event)
            if self.parser.their_state is h11.SEND_BODY:
                check_framing(self._fed, self._data)
        except h11.RemoteProtocolError as error:
            message = f"this is not a request of HTTP/1.1, or not a whole one: {str(error)[:200]}"
            message = str(error) if isinstance(error, TooMuch) else message
            # Some of h11's statuses are 5xx, which here say that the server has failed.
            status = error.error_status_hint if error.error_status_hint < 500 else 400
            self._refuse(Problem(status=status, message=message, code="invalid_http"))

    def _take(self, event: object) -> None:
        exchange = self._exchange
        if isinstance(event, h11.Request):
            self._begin(event)
        elif isinstance(event, h11.ConnectionClosed):
            if exchange is None or exchange.answered:
                self._close()
            self._deaf = True  # h11 says it again and again
        elif isinstance(event, h11.Data):
            assert exchange
            self._data += len(event.data)
            if not exchange.got(event.data):
                self._pause_reading()
        elif isinstance(event, h11.EndOfMessage):
            assert exchange
            exchange.whole()
            self._fed = len(self.parser.trailing_data[0])
            if exchange.answered:
                self._next()
            else:
                self._connections.works(self)

    def _begin(self, request: h11.Request) -> None:
        headers = list(request.headers)
        names = {name for name, _ in headers}
        if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
            # Whatever stands before this server may count the body's bytes otherwise.
            raise h11.RemoteProtocolError("the length of its body is said twice, or in a way of a later version")
        if not request.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("this server speaks HTTP/1.1 and 1.0")
        self._stop_timer()
        self._fed, self._data = len(self.parser.trailing_data[0]), 0
        waits = self.parser.they_are_waiting_for_100_continue
        self._exchange = Exchange(self, self._scope(request, headers), waits)
        task = self._loop.create_task(self._exchange.run(self._app))
        self._connections.tasks.add(task)
        task.add_done_callback(self._connections.tasks.discard)

    def _scope(self, request: h11.Request, headers: list[tuple[bytes, bytes]]) -> Scope:
        raw_path, _, query = ORIGIN.sub(b"", request.target, count=1).partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode(),
            "server": self._told("sockname"),
            "client": self._told("peername"),
            "scheme": "https" if self._told("ssl_object") else "http",
            "method": request.method.decode(),
            "root_path": self._root_path,
            "path": self._root_path + unquote((raw_path or b"/").decode("ascii")),
            "raw_path": self._root_path.encode() + (raw_path or b"/"),
            "query_string": query,
            "headers": headers,
            "state": {},
        }

    def _next(self) -> None:
        """Wait for another request, or go on with what has come of it already."""
        rest, ended = self.parser.trailing_data
        rest = rest.lstrip(b"\r\n")
        self.parser = h11.Connection(h11.SERVER, MAX_HEAD)
        self._exchange, self._fed, self._data = None, len(rest), 0
        self._deaf = self._probed = False
        if rest:
            self._within(HEAD_S, self._late)
            self.parser.receive_data(rest)
        else:
            self._within(KEEP_ALIVE_S, self._close)
        if ended:
            self.parser.receive_data(b"")
        self._resume()
        if rest or ended:
            self._handle()

    def _refuse(self, problem: Problem) -> None:
        """Answer that what the client sends is not a request, and take no more of it."""
        if self._exchange:
            self._exchange.end()
        if self.parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.write(last_words(problem))
        self._linger()

    def _late(self) -> None:
        if self._fed:
            message = f"the headers did not arrive within {HEAD_S:g} s"
            self._refuse(Problem(status=408, message=message, code="timeout"))
        else:
            self._close()

    def _too_far_ahead(self) -> bool:
        return self._exchange is not None and self._exchange.received and self._fed > MAX_AHEAD

    # Time, and the transport.

    def _within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        """Do something in so many seconds, unless this is called again."""
        self._stop_timer()
        if self._transport:
            self._timer = self._loop.call_later(seconds, otherwise)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _pause_reading(self) -> None:
        if self._transport and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._transport and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _linger(self) -> None:
        """Say that nothing more comes, and give the client time to read it: closing now could take it away again."""
        self._deaf = True
        self._connections.waits(self)
        self._resume()
        if self._transport and not self._transport.is_closing():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._within(LINGER_S, self._close)

    def _close(self) -> None:
        """Close once what was written has been sent."""
        self._deaf = True
        if self._transport and not self._transport.is_closing():
            self._transport.close()
            self._within(STALL_S, self.evict)

    def _watch(self, next_s: float = LOOK_S) -> None:
        """Find out whether the client has gone while it cannot be seen by reading.

        To the kernel one that has ended its side and one that has gone look the same, until something is sent to it.
        """
        exchange = self._exchange
        if exchange is None or exchange.answered or exchange.ended:
            return
        state = self._kernel_state()
        if state == TCP_CLOSE:
            self.evict()
            return
        asked = self._probed or exchange.begun or self.parser.their_http_version != b"1.1"
        if state == TCP_CLOSE_WAIT and not asked:
            self._probed = True
            self.inform()
        if self._look:
            self._look.cancel()
        self._look = self._loop.call_later(next_s, self._watch, min(2 * next_s, MAX_LOOK_S))

    def _kernel_state(self) -> int:
        """The kernel's state of the connection; where it does not tell, as if the client had gone."""
        if not hasattr(socket, "TCP_INFO"):
            return TCP_CLOSE
        return int(self._told("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])

    def _told(self, name: str) -> Any:
        return self._transport.get_extra_info(name) if self._transport else None


def last_words(problem: Problem) -> bytes:
    """An answer after which the connection is closed."""
    body = json.dumps(problem.body()).encode()
    headers = [date(), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), CLOSE]
    if problem.retry_after_s:
        headers.append((b"retry-after", str(problem.retry_after_s).encode()))
    lines = [b"HTTP/1.1 %d %s" % (problem.status, phrase(problem.status)), *(b"%s: %s" % pair for pair in headers)]
    return b"\r\n".join([*lines, b"", body])
