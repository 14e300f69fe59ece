"""What a source is cut into: parts of files, grouped into units of work, read as documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from raymodels.errors import DataError

Kind = Literal["text", "jsonl", "parquet", "hf"]

SMALLEST_UNIT = 4 << 20
LARGEST_UNIT = 256 << 20
USUAL_UNITS = 1024


@dataclass(frozen=True)
class Part:
    """A stretch of one file, or of one Hugging Face dataset.

    ``name`` is its identity: relative to the source, so that it does not depend on where the source lies. ``start`` and
    ``stop`` count bytes (text, jsonl), row groups (parquet) or rows (hf). ``size`` is in bytes and may be an estimate.
    """

    kind: Kind
    uri: str
    name: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Unit:
    """What one worker prepares at a time: consecutive parts. It becomes one shard per split."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Document:
    """One text and the identity that decides which split it falls into."""

    identity: str
    text: str

    @property
    def draw(self) -> float:
        """A number in [0, 1) that only depends on the identity; below ``eval_fraction`` means held out."""
        digest = hashlib.blake2b(self.identity.encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) / (1 << 53)


def unit_bytes(total: int) -> int:
    """The size to aim at for one unit: small enough to share out the work, large enough to keep shards few."""
    return min(max(SMALLEST_UNIT, total // USUAL_UNITS), LARGEST_UNIT)


def group(parts: Iterable[Part], limit: int) -> list[Unit]:
    """Join consecutive parts into units of at most ``limit`` bytes; a larger part is a unit of its own."""
    return [Unit(tuple(together)) for together in _together(parts, limit)]


def _together(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    open_parts: list[Part] = []
    size = 0
    for part in parts:
        if open_parts and size + part.size > limit:
            yield open_parts
            open_parts, size = [], 0
        open_parts.append(part)
        size += part.size
    if open_parts:
        yield open_parts


def decode(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        DataError: they are not UTF-8, or hold NUL bytes as binary files do.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not text: byte {error.start} is not UTF-8") from error
    return checked(text, where)


def checked(text: str, where: str) -> str:
    """The text itself, if it is one.

    Raises:
        DataError: it holds NUL characters or unpaired surrogates.
    """
    if "\0" in text:
        raise DataError(f"{where} is not text: it holds a NUL character at {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not text: character {error.start} is an unpaired surrogate") from error
    return text
