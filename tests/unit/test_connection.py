"""The gateway's own HTTP port, spoken to by raw sockets: what is answered, what is refused, and that all of it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn.config
import uvloop
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from raymodels.serve import connection, listener, proxy
from raymodels.serve.http_limits import MAX_HEAD, MAX_HEADERS, MAX_LINE
from raymodels.serve.listener import Leaving, Listener, shared_port
from raymodels.serve.tls import Certificate

HOST = "127.0.0.1"
CLOSING = b"GET /0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
GET = b"GET /0 HTTP/1.1\r\nHost: a\r\n\r\n"


class App:
    """Reads the body, unless the path is /refused, waits as many seconds as the path says, says what it was sent."""

    def __init__(self) -> None:
        self.cancelled = self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, more, path = 0, scope["path"] != "/refused", scope["path"]
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        try:
            await asyncio.sleep(float(path[1:]) if path[1:2].isdigit() else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        said = json.dumps({"path": path, "size": size, "version": scope["http_version"]}).encode()
        stream, status = path in ("/stream", "/endless"), 401 if path == "/refused" else 200
        headers = [] if stream else [(b"content-length", str(len(said)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if path == "/endless":
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        for piece in (said[:10], said[10:]) if stream else ():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if stream else said})


class Served:
    """A listener in a thread of its own, or the server that Ray Serve builds in its proxies, as we have it built."""

    def __init__(self, kind: str = "uvloop", tls: Path | None = None, **options: Any) -> None:
        self.app = App()
        self.port = free_port()
        self._kind, self._tls, self._options = kind, tls, options
        self._loop = asyncio.new_event_loop() if kind == "asyncio" else uvloop.new_event_loop()
        self._client, self._ca = ssl.create_default_context(), trustme.CA() if tls else None
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    async def _main(self) -> None:
        if self._kind == "proxy":
            await self._as_proxy()
            return
        listener = Listener(self.app, shared_port(HOST, self.port), self._certificate(), **self._options)
        self.connections = listener._connections
        self._started.set()
        await self._stop.wait()
        await listener.drain()

    async def _as_proxy(self) -> None:
        kinds = dict(uvicorn.config.HTTP_PROTOCOLS)
        try:
            assert proxy.bound_connections() == []
            options = HTTPOptions(host=HOST, port=self.port)
            serving, server = await start_asgi_http_server(Leaving(self.app), options, event_loop=self._loop)
            while not server.started:
                await asyncio.sleep(0.01)
        finally:
            uvicorn.config.HTTP_PROTOCOLS.update(kinds)
        self._started.set()
        await self._stop.wait()
        server.should_exit = True
        await serving

    def _certificate(self) -> Certificate | None:
        if not (self._ca and self._tls):
            return None
        issued = self._ca.issue_cert(HOST)
        cert, key = self._tls / "tls.crt", self._tls / "tls.key"
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self._ca.configure_trust(self._client)
        return Certificate(str(cert), str(key))

    def connect(self, greet: bool = True) -> socket.socket:
        made = socket.create_connection((HOST, self.port), timeout=20)
        return self._client.wrap_socket(made, server_hostname=HOST) if self._tls and greet else made

    def ask(self, *pieces: bytes) -> bytes:
        """All that is answered until the connection is closed."""
        with self.connect() as client:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                for piece in pieces:
                    client.sendall(piece)
            return everything(client)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture(autouse=True)
def short_farewells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of connections that TLS does not let end in one direction only."""
    monkeypatch.setattr(connection, "LINGER_S", 0.2)


@pytest.fixture(scope="module", params=["asyncio", "uvloop", "proxy"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with Served(request.param) as served:
        yield served


@pytest.fixture(scope="module", params=["http", "https", "proxy"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Over TCP, over TLS and through a proxy of Serve's."""
    tls = tmp_path_factory.mktemp("tls") if request.param == "https" else None
    with Served("proxy" if request.param == "proxy" else "uvloop", tls) as served:
        yield served


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def everything(client: socket.socket) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := client.recv(1 << 16):
            received += piece
    return bytes(received)


def one(client: socket.socket) -> tuple[int, bytes, bytes]:
    """Status, headers and body of the next answer, which has a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(1 << 16)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(1 << 16)
    return status(head), head, body[:length]


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def error(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def memory() -> int:
    """Bytes that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def sends_without_end(served: Served, beginning: bytes, piece: bytes, most: int = 48 << 20) -> Iterator[Any]:
    """A client that sends until it is stopped; it must be, long before ``most`` bytes, and cost hardly any memory."""
    before, sent = memory(), 0
    with served.connect() as client:
        client.sendall(beginning)
        try:
            while sent < most:
                sent += client.send(piece)
        except (ConnectionError, ssl.SSLError):
            pass
        yield everything(client)
    assert memory() - before < 8 << 20


LINES = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(60))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /" + b"x" * 100_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /" + b"x" * MAX_LINE + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + LINES * 50 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X:\r\n" * 8000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\nHost: a\n" + b"X:\n" * 8000 + b"\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n" + b" 2\r\n" * 8000 + b"\r\n", 431),
    ],
    ids=["path of 100 MB", "path", "headers of 3 MB", "one header", "8000 headers", "bare line feeds", "folded"],
)
def test_what_is_too_long_is_refused(either: Served, request_: bytes, expected: int) -> None:
    answer = either.ask(request_)
    assert status(answer) == expected
    assert error(answer)["code"] == "invalid_http"


def test_what_is_just_short_enough_is_answered(either: Served) -> None:
    line = b"GET /0?" + b"x" * (MAX_LINE - 18) + b" HTTP/1.1\r\n"
    headers = b"Host: a\r\nConnection: close\r\n" + b"X: y\r\n" * (MAX_HEADERS - 3)
    assert status(either.ask(line + headers + b"\r\n")) == 200
    assert (
        status(either.ask(b"GET /0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: " + b"x" * 32_600 + b"\r\n\r\n"))
        == 200
    )


@pytest.mark.parametrize("piece", [LINES, b"X: y\r\n" * 10_000, b"x" * 60_000], ids=["lines", "short lines", "no line"])
def test_headers_without_end(either: Served, piece: bytes) -> None:
    with sends_without_end(either, b"GET / HTTP/1.1\r\nHost: a\r\n", piece) as answer:
        assert status(answer) in (0, 431)


CHUNKED = b"POST /0 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "piece",
    [
        b"1\r\nx\r\n" * 10_000,
        b"1;" + b"x" * 10_000 + b"\r\nx\r\n",
        b"1;" + b"x" * 60_000,
        b"0\r\n" + b"X: y\r\n" * 10_000,
    ],
    ids=["tiny chunks", "extensions", "one extension", "trailers"],
)
def test_what_stands_between_the_pieces_of_a_body_is_bounded(either: Served, piece: bytes) -> None:
    with sends_without_end(either, CHUNKED, piece) as answer:
        assert status(answer) in (0, 400, 431)


def test_chunks_extensions_and_trailers_in_moderation(either: Served) -> None:
    body = (
        b"".join(b"1;a=b\r\nx\r\n" for _ in range(1000)) + b"400\r\n" + b"y" * 1024 + b"\r\n0\r\nX-Digest: abc\r\n\r\n"
    )
    with either.connect() as client:
        for _ in range(2):
            client.sendall(CHUNKED + body)
            assert json.loads(one(client)[2])["size"] == 2024
        client.sendall(
            CHUNKED.replace(b"/0", b"/1") + b"".join(b"%x\r\n%s\r\n" % (8192, b"z" * 8192) for _ in range(512))
        )
        client.sendall(b"0\r\n\r\n")
        assert json.loads(one(client)[2])["size"] == 4 << 20


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /0 HTTP/1.1\r\n\r\n",
        b"GET /0 HTTP/1.1\r\nHost: a\r\nHo st: b\r\n\r\n",
        b"POST /0 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /0 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /0 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /0 HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        CHUNKED + b"zz\r\n",
    ],
)
def test_what_is_not_http_is_refused(served: Served, request_: bytes) -> None:
    answer = served.ask(request_)
    assert status(answer) == 400
    assert error(answer)["code"] == "invalid_http"


def test_what_is_http_of_another_kind_is_refused(served: Served) -> None:
    assert status(served.ask(CHUNKED.replace(b"chunked", b"gzip, chunked"))) == 400
    assert status(served.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) == 400


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_an_upgrade_is_declined_and_the_request_answered(either: Served, upgrade: bytes) -> None:
    """As every Java HttpClient sends it."""
    headers = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\n" % upgrade
    with either.connect() as client:
        for _ in range(2):
            client.sendall(b"POST /0 HTTP/1.1\r\nHost: a\r\n%sContent-Length: 5\r\n\r\nhello" % headers)
            code, _, body = one(client)
            assert (code, json.loads(body)["size"]) == (200, 5)


def test_http_1_0_is_answered_without_chunks(either: Served) -> None:
    head, _, body = either.ask(b"GET /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert json.loads(body) == {"path": "/stream", "size": 0, "version": "1.0"}
    assert (
        b"transfer-encoding: chunked"
        in either.ask(b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").lower()
    )


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("path", [b"/0", b"/0.3", b"/stream"])
def test_a_half_closed_client_is_answered(served: Served, version: bytes, path: bytes) -> None:
    with served.connect() as client:
        client.sendall(b"POST %s HTTP/%s\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" % (path, version))
        client.shutdown(socket.SHUT_WR)
        answer = everything(client).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert status(answer) == 200
    assert b'"size": 5' in answer.replace(b"\r\n", b"") or path == b"/stream"


def test_pipelined_requests_are_answered_in_order_and_before_the_end_of_the_client(served: Served) -> None:
    requests = b"".join(
        b"\r\nPOST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\r\n" % (n % 1) for n in range(50)
    )
    with served.connect() as client:
        client.sendall(requests)
        client.shutdown(socket.SHUT_WR)
        assert everything(client).count(b'"size": 3') == 50


def test_what_comes_behind_the_last_request_is_left_alone(served: Served) -> None:
    for last in (CLOSING, b"GET /0 HTTP/1.0\r\n\r\n"):
        for behind in (b"\r\n", GET, b"x" * 100_000):
            assert served.ask(last + behind).count(b"HTTP/1.1 200 ") == 1
        assert served.ask(last.replace(b"/0", b"/0.2"), b"", b"\r\n").count(b"HTTP/1.1 200 ") == 1


def test_a_client_that_has_gone_ends_its_request(served: Served) -> None:
    for after in (b"", GET, b"x" * 200_000):  # whether or not it has pipelined something
        cancelled = served.app.cancelled
        client = served.connect()
        client.sendall(GET.replace(b"/0", b"/30") + after)
        time.sleep(0.1)
        client.close()
        until(lambda before=cancelled: served.app.cancelled == before + 1)  # type: ignore[misc]


def test_a_refusal_reaches_a_client_that_is_still_sending(either: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 5)
    for connection_ in (b"keep-alive", b"close"):
        with either.connect() as client:
            head = (
                b"POST /refused HTTP/1.1\r\nHost: a\r\nConnection: %s\r\nContent-Length: 3000000\r\n\r\n" % connection_
            )
            client.sendall(head + b"x" * 3_000_000)
            assert one(client)[0] == 401
            if connection_ == b"keep-alive":
                client.sendall(GET)
                assert one(client)[0] == 200


def test_100_continue_is_sent_to_who_waits_for_it(either: Served) -> None:
    with either.connect() as client:
        client.sendall(b"POST /0 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"ok")
        assert one(client)[0] == 200


def test_absolute_targets_and_head(served: Served) -> None:
    assert b'"path": "/0"' in served.ask(b"GET http://a.example/0?x=y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    head, _, body = served.ask(b"HEAD /0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").partition(b"\r\n\r\n")
    assert status(head) == 200
    assert body == b""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_S", "KEEP_ALIVE_S", "LINGER_S", "STALL_S"):
        monkeypatch.setattr(connection, name, 0.5)
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.5)


@pytest.mark.usefixtures("impatient")
class TestTime:
    """Nothing lasts longer than it may, whatever the client does."""

    def test_headers_byte_by_byte_are_408(self, either: Served) -> None:
        with either.connect() as client:
            began = time.monotonic()
            client.settimeout(0.05)
            answer = b""
            for byte in b"GET /0 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100:
                with contextlib.suppress(TimeoutError):
                    answer = client.recv(4096)
                    break
                client.sendall(bytes([byte]))
            assert status(answer) == 408
            assert time.monotonic() - began < 3

    def test_idle_connections_are_closed(self, either: Served) -> None:
        with either.connect() as silent, either.connect() as idle:
            idle.sendall(GET)
            assert one(idle)[0] == 200
            assert everything(silent) == everything(idle) == b""

    def test_a_refused_body_without_end_is_not_read_for_long(self, either: Served) -> None:
        head = b"POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000000\r\n\r\n"
        with either.connect() as client:
            client.sendall(head)
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while True:
                    client.sendall(b"x" * 60_000)
                    time.sleep(0.005)

    def test_an_answer_that_is_never_read(self, either: Served) -> None:
        before = memory()
        with either.connect() as client:
            client.sendall(GET.replace(b"/0", b"/endless"))
            began = time.monotonic()
            until(lambda: either.app.running == 1)
            until(lambda: either.app.running == 0)
            assert time.monotonic() - began < 5
            assert memory() - before < 8 << 20

    def test_a_handshake_that_does_not_come(self, tmp_path: Path) -> None:
        with Served(tls=tmp_path) as served, served.connect(greet=False) as client:
            assert everything(client) == b""
            until(lambda: not served.connections.open)


@pytest.mark.parametrize("tls", [False, True])
def test_waiting_connections_make_room_and_busy_ones_stay(tls: bool, tmp_path: Path) -> None:
    with Served(tls=tmp_path if tls else None, max_connections=4) as served, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(served.connect()) for _ in range(2)]
        for client in busy:
            client.sendall(GET.replace(b"/0", b"/1.5"))
        time.sleep(0.2)
        crowd = [stack.enter_context(served.connect(greet=False)) for _ in range(20)]
        with served.connect() as late:
            late.sendall(GET)
            assert one(late)[0] == 200
        assert len(served.connections.open) <= 4
        assert [one(client)[0] for client in busy] == [200, 200]
        assert everything(crowd[0]) == b""


def test_when_all_are_busy_new_ones_are_503() -> None:
    with Served(max_connections=2) as served, served.connect() as first, served.connect() as second:
        for client in (first, second):
            client.sendall(GET.replace(b"/0", b"/1"))
        time.sleep(0.2)
        answer = served.ask(GET)
        assert status(answer) == 503
        assert error(answer)["code"] == "too_many_connections"
        assert b"retry-after: 1" in answer
        assert [one(first)[0], one(second)[0]] == [200, 200]


def test_the_address_with_most_waiting_connections_gives_one_up() -> None:
    with Served(max_connections=6) as served, contextlib.ExitStack() as stack:
        polite = socket.create_connection((HOST, served.port), 20, ("127.0.0.2", 0))
        stack.enter_context(polite)
        time.sleep(0.1)
        for _ in range(20):
            stack.enter_context(served.connect())
        polite.sendall(GET)
        assert one(polite)[0] == 200
