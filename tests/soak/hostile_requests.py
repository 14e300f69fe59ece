"""The hostile requests of a seed, by number: all kinds of bodies, sent in all ways, and all that is odd on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from tests.soak import hostile_bodies, hostile_wire
from tests.soak.hostile_bodies import Body, Maker
from tests.soak.hostile_wire import JSON, Case, Keys, Wire, bearer, head, posted, sends

H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAA")
CHUNK = 50_000


def case(seed: int, number: int, keys: Keys) -> Case:
    """From 1 on; each fourth is of a mebibyte and more. All kinds come before any comes again."""
    big = is_big(number)
    makers = BIG if big else SMALL
    round_, at = divmod((number // 4 if big else number - number // 4) - 1, len(makers))
    kind = Random(f"{seed} {big} {round_}").sample(sorted(makers), len(makers))[at]
    return replace(makers[kind](Random(f"{seed} {number}"), keys), number=number, kind=kind)


def is_big(number: int) -> bool:
    return number % 4 == 0


def with_body(make: Maker) -> Wire:
    """The body, sent as most clients do or in one of the ways that a few do."""

    def made(draw: Random, keys: Keys) -> Case:
        body, key, way = make(draw), keys["hostile"], draw.random()
        if way < 0.10:
            return sends(*posted(body, key), leave_after_s=draw.choice([0.01, 0.1, 1.0]) * draw.random())
        if way < 0.14:
            return sends(*chunked(body, key))
        if way < 0.20:
            return sends(*posted(body, keys["spent"]))
        if way < 0.23:
            return sends(*posted(body, "rm-" + "a" * 43))
        if way < 0.26:
            return sends(*posted(body, key), half_close=True)
        if way < 0.29:
            return sends(*posted(body, key, version="1.0"))
        if way < 0.32:
            return sends(*posted(body, key, *H2C))
        if way < 0.34:
            return sends(*posted(body, key, "Expect: 100-continue"))
        return sends(*posted(body, key))

    return made


def chunked(body: Body, key: str) -> Iterator[bytes]:
    fields = ("Host: soak", bearer(key), JSON, "Transfer-Encoding: chunked", "Connection: close")
    yield head(f"POST {body.path} HTTP/1.1", *fields)
    for at in range(0, len(body.content), CHUNK):
        piece = body.content[at : at + CHUNK]
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


SMALL = {kind: with_body(make) for kind, make in hostile_bodies.SMALL.items()} | hostile_wire.SMALL
BIG = {kind: with_body(make) for kind, make in hostile_bodies.BIG.items()} | hostile_wire.BIG
