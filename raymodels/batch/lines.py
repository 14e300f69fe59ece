"""OpenAI's batch files: lines that ask, cut into parts of a bounded size, and lines that answer.

A part is some consecutive lines of the input, known by where it begins and by its checksum. So the input is read once
by the driver, line by line, and its parts once more by whoever answers them; nobody holds all of it. What the driver
keeps in memory is a digest of every ``custom_id``, about 100 bytes a line.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from raymodels import storage
from raymodels.errors import DataError
from raymodels.serve.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Problem,
    Refused,
    read_chat,
    read_completion,
    read_embedding,
    refused,
)

Json = dict[str, Any]
Work = CompletionRequest | ChatRequest | EmbeddingRequest

PART_LINES = 32
PART_BYTES = 8 << 20
LINE_BYTES = 8 << 20
"""A longer line is not answered."""
READERS: dict[str, Callable[[Any], Work]] = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/embeddings": read_embedding,
}


@dataclass(frozen=True)
class Part:
    """Some consecutive lines of the input.

    Args:
        start: its first byte in the input; ``bytes`` is its length.
        first_line: the number of its first line, counted from 1; ``lines`` are those that are not blank.
        repeated: numbers of lines whose ``custom_id`` stands on an earlier line of the input.
    """

    number: int
    start: int
    bytes: int
    first_line: int
    lines: int
    sha256: str
    repeated: frozenset[int]


@dataclass(frozen=True)
class Input:
    """A whole input file."""

    place: str
    bytes: int
    sha256: str
    parts: list[Part]

    @property
    def lines(self) -> int:
        return sum(part.lines for part in self.parts)


@dataclass(frozen=True)
class Line:
    """One line of the input. ``content`` is none where there is more of it than is read."""

    number: int
    content: bytes | None
    repeated: bool


@dataclass(frozen=True)
class Entry:
    """What a line in the right format asks for."""

    custom_id: str
    url: str
    body: Json


class NoRequest(Exception):
    """A line that does not get as far as being a request; ``code`` is what OpenAI calls the reason."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(code, message, custom_id)  # all of them, so that it survives pickling
        self.code = code
        self.custom_id = custom_id

    def __str__(self) -> str:
        return str(self.args[1])


def index(place: str) -> Input:
    """Read an input file and cut it into parts.

    Raises:
        DataError: no line of it is more than blank.
        StorageError: it cannot be read.
    """
    whole, parts, seen = hashlib.sha256(), list[Part](), set[bytes]()
    start = end = number = 0
    with _opened(place) as file:
        while True:
            part, first, lines, repeated = hashlib.sha256(), number + 1, 0, set[int]()
            while lines < PART_LINES and end - start < PART_BYTES and (read := _read_line(file, part, whole)):
                size, content = read
                number, end = number + 1, end + size
                if content is not None and not content.strip():
                    continue
                lines += 1
                custom_id = _digest(content)
                if custom_id in seen:
                    repeated.add(number)
                elif custom_id:
                    seen.add(custom_id)
            if lines:
                at = len(parts)
                parts.append(Part(at, start, end - start, first, lines, part.hexdigest(), frozenset(repeated)))
            if start == end:
                break
            start = end
    if not parts:
        raise DataError(f"{place} holds no request: it must have one JSON object per line")
    return Input(place, end, whole.hexdigest(), parts)


def lines_of(place: str, part: Part) -> Iterator[Line]:
    """The lines of a part that are not blank.

    Raises:
        DataError: the input is not what it was when it was indexed.
        StorageError: it cannot be read.
    """
    digest, left, number = hashlib.sha256(), part.bytes, part.first_line
    with _opened(place) as file:
        file.seek(part.start)
        while left > 0 and (read := _read_line(file, digest)):
            size, content = read
            if content is None or content.strip():
                yield Line(number, content, number in part.repeated)
            number, left = number + 1, left - size
    if left or digest.hexdigest() != part.sha256:
        raise DataError(f"{place} changed while it was worked on: run the batch again, with another output")


def entry_of(line: Line) -> Entry:
    """What a line asks for.

    Raises:
        NoRequest: it is not in the format.
    """
    given = _object(line)
    custom_id, method, url, body = (given.get(field) for field in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str):
        raise NoRequest("missing_required_parameter", "custom_id must be a string, another one in every line")
    if line.repeated:
        raise NoRequest("duplicate_custom_id", f"custom_id {custom_id!r} stands on an earlier line", custom_id)
    if method != "POST":
        raise NoRequest("invalid_method", f"method must be POST, not {method!r}", custom_id)
    if not isinstance(url, str) or url not in READERS:
        raise NoRequest("invalid_url", f"url must be one of {', '.join(READERS)}, not {url!r}", custom_id)
    if not isinstance(body, dict):
        raise NoRequest("missing_required_parameter", "body must be the request, a JSON object", custom_id)
    return Entry(custom_id, url, body)


def request_of(entry: Entry, names: Collection[str], unnamed: str) -> Work:
    """The request of an entry, read as the endpoint reads it.

    Args:
        names: the models that it may be for.
        unnamed: which of them it is for if it does not say.

    Raises:
        Refused: names the field.
    """
    body = entry.body if entry.body.get("model") is not None else entry.body | {"model": unnamed}
    request: Work = READERS[entry.url](body)
    if request.model not in names:
        message = f"this batch is for the model {' or '.join(map(repr, names))}, not {request.model!r}"
        raise Refused(Problem(status=404, message=message, param="model", code="model_not_found"))
    if not isinstance(request, EmbeddingRequest) and request.stream:
        raise refused("stream: the answers of a batch are whole, leave it out", "stream")
    return request


def answer_line(custom_id: str, status: int, body: Json) -> Json:
    """The line that answers a request, whether it succeeded or not."""
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {"id": _line_id(), "custom_id": custom_id, "response": response, "error": None}


def error_line(number: int, error: NoRequest) -> Json:
    """The line about one that was no request; ``line`` tells it from others without a ``custom_id``."""
    told = {"code": error.code, "message": str(error), "line": number}
    return {"id": _line_id(), "custom_id": error.custom_id, "response": None, "error": told}


def _object(line: Line) -> Json:
    if line.content is None:
        raise NoRequest("invalid_json_line", f"the line is over {LINE_BYTES} bytes")
    try:
        found = json.loads(line.content)
    except (ValueError, RecursionError) as error:
        raise NoRequest("invalid_json_line", f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise NoRequest("invalid_json_line", f"the line must be a JSON object, not {type(found).__name__}")
    return found


def _digest(content: bytes | None) -> bytes:
    """Of a line's custom_id; empty if it has none."""
    try:
        custom_id = _object(Line(0, content, False)).get("custom_id")
    except NoRequest:
        return b""
    if not isinstance(custom_id, str):
        return b""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _line_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


@contextmanager
def _opened(place: str) -> Iterator[IO[bytes]]:
    # Of what fsspec opens, readline takes no limit.
    with storage.open_file(place) as file, io.BufferedReader(file, storage.CHUNK) as reader:  # type: ignore[type-var]
        yield reader


def _read_line(file: IO[bytes], *digests: Any) -> tuple[int, bytes | None] | None:
    """The next line's size in bytes and its content, none if it is over `LINE_BYTES`; none at the end of the file."""
    size, content = 0, b""
    while piece := file.readline(LINE_BYTES):
        for digest in digests:
            digest.update(piece)
        size, content = size + len(piece), piece
        if piece.endswith(b"\n"):
            break
    if not size:
        return None
    return size, content if size <= LINE_BYTES else None
