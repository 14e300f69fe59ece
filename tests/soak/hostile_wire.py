"""What comes over a connection beside a body: headers, lengths, chunks and lines that are odd, slow or endless."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from tests.soak import hostile_bodies
from tests.soak.hostile_bodies import CHAT, COMPLETIONS, MEBIBYTE, Body, completion

Piece = bytes | float
"""Something to send, or seconds to send nothing."""
ENDLESS = 64 * MEBIBYTE
"""What is sent of that which has no end, if the server lets it."""
SLOW_S = 0.5
JSON = "Content-Type: application/json"
KEEP = "Connection: keep-alive"
WEBSOCKET = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: YWJjZA=="]


@dataclass(frozen=True)
class Case:
    """What a client does on a connection of its own."""

    pieces: Callable[[], Iterator[Piece]]
    leave_after_s: float | None = None
    """When it closes the connection, whatever has come; none: once it is answered."""
    half_close: bool = False
    """Whether it says, after its last byte, that it sends no more."""
    beside: int = 0
    """Connections that it opens besides, and on which nothing comes."""
    number: int = 0
    kind: str = ""


Keys = Mapping[str, str]
"""By tenant: ``hostile``, and ``spent``, which is over its quota."""
Wire = Callable[[Random, Keys], Case]


def sends(*pieces: Piece, leave_after_s: float | None = None, half_close: bool = False) -> Case:
    return Case(lambda: iter(pieces), leave_after_s, half_close)


def head(line: str, *fields: str) -> bytes:
    return "\r\n".join([line, *fields, "", ""]).encode("utf-8", "surrogateescape")


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def opened(keys: Keys, *fields: str, path: str = COMPLETIONS) -> bytes:
    """The head of a request whose body is to come."""
    return head(f"POST {path} HTTP/1.1", "Host: soak", bearer(keys["hostile"]), JSON, *fields)


def posted(body: Body, key: str, *fields: str, version: str = "1.1") -> tuple[bytes, bytes]:
    own = () if any(field.startswith("Connection") for field in fields) else ("Connection: close",)
    length = f"Content-Length: {len(body.content)}"
    line = f"POST {body.path} HTTP/{version}"
    return head(line, "Host: soak", bearer(key), JSON, length, *own, *fields), body.content


OPENING = b"POST " + COMPLETIONS.encode() + b" HTTP/1.1\r\nHost: soak\r\n"


def endless(start: bytes, unit: bytes) -> Case:
    """A piece after the other until `ENDLESS`; then nothing more."""
    block = unit * (65536 // len(unit) + 1)

    def pieces() -> Iterator[Piece]:
        yield start
        for _ in range(ENDLESS // len(block)):
            yield block

    return Case(pieces)


def slow(start: bytes, unit: bytes) -> Case:
    """A few bytes at a time, for ever."""

    def pieces() -> Iterator[Piece]:
        yield start
        while True:
            yield SLOW_S
            yield unit

    return Case(pieces)


def endless_header_lines(draw: Random, keys: Keys) -> Case:
    return endless(OPENING, draw.choice([b"X-A: b\r\n", b"X-A: " + b"b" * 4000 + b"\r\n", b"a:\r\n", b" folded\r\n"]))


def endless_header(draw: Random, keys: Keys) -> Case:
    return endless(OPENING + draw.choice([b"X-A: ", b"Authorization: Bearer ", b"Cookie: ", b"X"]), b"a")


def endless_path(draw: Random, keys: Keys) -> Case:
    return endless(draw.choice([b"GET /", b"GET /v1/models?", b"POST /v1/", b"", b"GET http://soak/"]), b"a")


def endless_chunks(draw: Random, keys: Keys) -> Case:
    unit = draw.choice([b"1\r\n[\r\n", b"1;" + b"e" * 3000 + b"\r\n \r\n", b"0" * 5000])
    return endless(opened(keys, "Transfer-Encoding: chunked"), unit)


def endless_trailers(draw: Random, keys: Keys) -> Case:
    return endless(opened(keys, "Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\n", b"X-A: b\r\n")


def slow_header(draw: Random, keys: Keys) -> Case:
    return slow(OPENING, draw.choice([b"X-A: b\r\n", b"x"]))


def slow_body(draw: Random, keys: Keys) -> Case:
    return slow(opened(keys, "Content-Length: 100000", path=CHAT) + b"{", b" ")


def nothing(draw: Random, keys: Keys) -> Case:
    """A connection on which nothing comes, or half of a request."""
    return sends(draw.choice([b"", b"P", OPENING]), leave_after_s=draw.uniform(0, 4))


def many_connections(draw: Random, keys: Keys) -> Case:
    return Case(lambda: iter([]), draw.uniform(1, 4), beside=draw.choice([20, 100, 300]))


def many_headers(draw: Random, keys: Keys) -> Case:
    count, value = draw.choice([(50, "a"), (200, "a"), (5000, "a"), (60, "a" * 900), (3, "a" * 30_000)])
    return sends(*posted(completion(), keys["hostile"], *(f"X-{at}: {value}" for at in range(count))))


HEADERS = ["X-Request-Timeout: nan", "X-Request-Timeout: -1", "X-Request-Timeout: 1e-9", "X-Request-Timeout: 0.05"]
HEADERS += ["X-Request-Timeout: inf", "X-Request-ID: " + "a" * 5000, "X-Request-ID: \udcff", "Content-Encoding: gzip"]
HEADERS += ["Content-Type: text/plain", "Content-Type: application/json; charset=utf-16", "Accept: image/png"]
HEADERS += ["X A: b", "X-A : b", ": b", "X-A", "X-A: \x00", "traceparent: 00-x", "X-Forwarded-For: " + "1.1.1.1," * 900]
HEADERS += ["Content-Length: 3", "Content-Length: -1", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip"]
HEADERS += [
    "Range: bytes=0-",
    "Connection: Content-Length",
    "Authorization: Basic YTpi",
    "Authorization: Bearer \udcc3",
]
HEADERS += ["Host: other", "Te: \udcff"]


def odd_headers(draw: Random, keys: Keys) -> Case:
    return sends(*posted(completion(), keys["hostile"], *draw.sample(HEADERS, draw.randint(1, 2))))


def wrong_length(draw: Random, keys: Keys) -> Case:
    told = draw.choice(["abc", "-5", "1e3", "9" * 30, "0", "5", "+5", "0x10", "", "5, 5", "5, 6"])
    start = opened(keys, f"Content-Length: {told}")
    return sends(start, completion().content, leave_after_s=draw.uniform(0.5, 3))


def cut_short(draw: Random, keys: Keys) -> Case:
    """The client ends its side of the connection before the whole body that it told of."""
    start, content = posted(completion(), keys["hostile"])
    return sends(start, content[: draw.randint(0, len(content) - 1)], half_close=True)


CHUNKS = [b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"5\r\nabcdefgh\r\n", b"\r\n", b"1\n{\n0\n\n", b"0x5\r\nabcde\r\n"]


def bad_chunks(draw: Random, keys: Keys) -> Case:
    start = opened(keys, "Transfer-Encoding: chunked")
    return sends(start, draw.choice(CHUNKS), leave_after_s=draw.uniform(0.5, 3))


LINES = ["GET / HTTP/0.9", "GET /", "PRI * HTTP/2.0", "CONNECT soak:1 HTTP/1.1", "TRACE / HTTP/1.1", "PUT / HTTP/1.1"]
LINES += ["GET http://soak/v1/models HTTP/1.1", "GET /v1/models HTTP/3.0", "get /v1/models HTTP/1.1"]
LINES += ["GET /%00%ff%2e%2e/ HTTP/1.1", "GET /../../etc/passwd HTTP/1.1", "GET /\udcff HTTP/1.1", "G\x00T / HTTP/1.1"]
LINES += ["HEAD /openapi.json HTTP/1.1", "GET  /  HTTP/1.1", "\x16\x03\x01\x02\x00\x01", "DELETE /v1/models HTTP/1.1"]
LINES += [
    "GET /v1/models/" + "%41" * 2000 + " HTTP/1.1",
    "GET /tokenizer_info?model=%ff HTTP/1.1",
    "OPTIONS * HTTP/1.1",
]


def odd_request_line(draw: Random, keys: Keys) -> Case:
    own = (bearer(keys["hostile"]), "Connection: close")
    return sends(head(draw.choice(LINES), "Host: soak", *own), leave_after_s=5.0)


ROUTES = ["/v1/models", "/v1/models/tiny", "/v1/models/other", "/openapi.json", "/healthz", "/readyz", "/metrics"]
ROUTES += ["/tokenizer_info?model=tiny", "/tokenizer_info", "/docs", "/", "//v1/models", "/v1", "/-/routes"]


def any_route(draw: Random, keys: Keys) -> Case:
    key = draw.choice([keys["hostile"], keys["spent"], "rm-wrong", ""])
    method = draw.choice(["GET", "GET", "GET", "POST", "HEAD", "PUT", "OPTIONS", "PATCH"])
    return sends(head(f"{method} {draw.choice(ROUTES)} HTTP/1.1", "Host: soak", bearer(key), "Connection: close"))


def other_protocol(draw: Random, keys: Keys) -> Case:
    """Bytes of something that is not HTTP/1, or asks for another protocol over it."""
    offers = [head("GET /v1/models HTTP/1.1", "Host: soak", bearer(keys["hostile"]), *WEBSOCKET)]
    offers += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), draw.randbytes(500), b"\r\n" * 50]
    return sends(draw.choice(offers), leave_after_s=4.0)


def pipelined(draw: Random, keys: Keys) -> Case:
    route = draw.choice(["/v1/models", "/readyz", "/healthz", "/openapi.json", "/metrics"])
    one = head(f"GET {route} HTTP/1.1", "Host: soak", bearer(keys["hostile"]))
    both = one + b"".join(posted(completion(), keys["hostile"], KEEP))
    return sends(draw.choice([one, both]) * draw.choice([5, 50, 500]), leave_after_s=draw.uniform(0, 3))


def refused_again_and_again(draw: Random, keys: Keys) -> Case:
    """Requests one behind the other on one connection, of a key that is over its quota."""
    return sends(b"".join(posted(completion(), keys["spent"], KEEP)) * 100, leave_after_s=3.0)


def leaves(draw: Random, keys: Keys) -> Case:
    """A request that is right, and whose client leaves at a random moment."""
    body = hostile_bodies.long_answer(draw)
    return sends(*posted(body, keys["hostile"]), leave_after_s=draw.choice([0.0, 0.01, 0.1, 1.0]) * draw.random())


def _named(*wires: Wire) -> dict[str, Wire]:
    return {wire.__name__.replace("_", " "): wire for wire in wires}


SMALL = _named(slow_header, slow_body, nothing, many_connections, many_headers, odd_headers, wrong_length, cut_short)
SMALL |= _named(bad_chunks, odd_request_line, any_route, other_protocol, pipelined, refused_again_and_again, leaves)
BIG = _named(endless_header_lines, endless_header, endless_path, endless_chunks, endless_trailers)
