"""How large the parts of an HTTP request may be that are no body, and what a client is told that sends more."""

from __future__ import annotations

import re

import h11

MAX_LINE, MAX_HEAD, MAX_HEADERS = 8 << 10, 32 << 10, 100
"""Bytes of the first line, bytes of it and all headers together, and number of headers."""
MAX_FRAMING, FRAMING_SHARE = 8 << 10, 32
"""Bytes of chunk sizes, of their extensions and of trailers: so many, and one more for each 32 bytes of the body."""
MAX_AHEAD = 64 << 10
"""Bytes of further requests that are read while one is answered."""
SLICE = 8 << 10
"""Bytes that are parsed before it is counted what they held: parsing thousands of small parts takes milliseconds."""

HEAD_END = re.compile(rb"\n\r?\n")


class TooMuch(h11.RemoteProtocolError):
    """What a client has sent is over a limit."""


def check_head(received: bytes) -> None:
    """Raise `TooMuch` unless what has come of a request so far may be the beginning of one."""
    end = HEAD_END.search(received)
    head = received[: end.start()] if end else received
    if len(head.partition(b"\n")[0]) > MAX_LINE:
        raise TooMuch(f"the path is too long: the first line of a request may have {MAX_LINE} bytes", 414)
    if len(head) > MAX_HEAD:
        raise TooMuch(f"the headers are too long: together they may have {MAX_HEAD} bytes", 431)
    if head.count(b"\n") > MAX_HEADERS:
        raise TooMuch(f"there are too many headers: a request may have {MAX_HEADERS}", 431)


def check_framing(received: int, body: int) -> None:
    """Raise `TooMuch` if too much of the bytes received of a body are not part of it."""
    if received - body > MAX_FRAMING + SLICE + body // FRAMING_SHARE:
        raise TooMuch("the body comes in pieces that are too small, or with extensions or trailers that are too long")
