"""The soak's hostile requests follow from seed and number, and its client sees how each ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import pytest

from tests.soak.hostile_bodies import MEBIBYTE
from tests.soak.hostile_client import Outcome, attack
from tests.soak.hostile_report import Found, culprits
from tests.soak.hostile_requests import BIG, SMALL, case, is_big
from tests.soak.hostile_wire import Case, head, sends

KEYS = {"hostile": "rm-hostile", "spent": "rm-spent"}
PIECES = 40


def sent(number: int, seed: int = 7) -> list[bytes | float]:
    return list(islice(case(seed, number, KEYS).pieces(), PIECES))


def test_a_case_follows_from_its_seed_and_number() -> None:
    for number in (3, 8, 50, 101):
        assert sent(number) == sent(number)
    assert [sent(number, seed=7) for number in range(1, 4)] != [sent(number, seed=8) for number in range(1, 4)]


def test_all_kinds_come_before_any_comes_again_and_a_quarter_is_big() -> None:
    numbers = range(1, 4 * len(BIG) + 1)
    kinds = {number: case(7, number, KEYS).kind for number in numbers}
    assert {kind for number, kind in kinds.items() if is_big(number)} == set(BIG)
    assert {case(7, number, KEYS).kind for number in range(1, 2 * len(SMALL)) if not is_big(number)} == set(SMALL)
    for number in filter(is_big, numbers):
        assert sum(map(len, filter(lambda piece: isinstance(piece, bytes), sent(number)))) >= MEBIBYTE, kinds[number]


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answers one connection, after something has come on it; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(5)


ERROR = b'{"error": {"message": "no", "code": "bad"}}'
EVENT = b'data: {"error":{"message":"no","code":"replica_failed"}}\n\n'
REFUSED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s"
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
)


@pytest.mark.parametrize(
    ("answer", "ended", "status", "code", "plain"),
    [
        (REFUSED % (len(ERROR), ERROR), "answered", 400, "bad", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + REFUSED % (len(ERROR), ERROR), "answered", 400, "bad", False),
        (2 * (REFUSED % (len(ERROR), ERROR)), "answered", 400, "bad", False),
        (REFUSED % (4, b"nope"), "answered", 400, "", True),
        (STREAM % (len(EVENT), EVENT), "answered", 200, "replica_failed", False),
        (b"", "closed", 0, "", False),
    ],
)
def test_how_a_case_ends(answer: bytes, ended: str, status: int, code: str, plain: bool) -> None:
    with server(lambda connection: connection.sendall(answer)) as port:
        outcome = attack("127.0.0.1", port, sends(head("GET / HTTP/1.1")), longest_s=5)
    assert (outcome.ended, outcome.status, outcome.code, outcome.plain) == (ended, status, code, plain)
    assert outcome.seconds < 4


@pytest.mark.parametrize(("leave_after_s", "ended"), [(None, "open"), (0.1, "left")])
def test_a_server_that_holds_the_connection(leave_after_s: float | None, ended: str) -> None:
    waited: list[bytes] = []
    asked = Case(lambda: iter([b"x", 0.01, b"x"]), leave_after_s)
    with server(lambda connection: waited.extend(iter(lambda: connection.recv(9), b""))) as port:
        outcome = attack("127.0.0.1", port, asked, longest_s=0.2)
    assert (outcome.ended, outcome.sent, waited) == (ended, 2, [b"x"])


def test_what_a_case_alone_did_is_told() -> None:
    outcome = Outcome(3, "deep", 0.0, status=500, code="internal_error", error_bytes=90)
    told = list(culprits(Found([], [], [outcome], [], [])))
    assert told == ["case 3 (deep): 500 internal_error", "the longest error has 90 bytes: case 3 (deep)"]


def test_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outcome: Outcome = attack("127.0.0.1", port, sends(b"x"), longest_s=1)
    assert outcome.ended == "not connected"
