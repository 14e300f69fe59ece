"""From the bytes of a body to a request: here for small bodies, in a process of `bodies` for large ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from raymodels.serve.schema import (
    Refused,
    read_chat,
    read_completion,
    read_detokenize,
    read_embedding,
    read_tokenize,
    refused,
)
from raymodels.serve.sealed import packed
from raymodels.serve.wire import MAX_DEPTH, Wire, values

Reader = Callable[[Any], Any]
READERS: dict[str, Reader] = {
    read.__name__: read for read in (read_chat, read_completion, read_detokenize, read_embedding, read_tokenize)
}


def read(body: bytes, reader: Reader) -> Any:
    """The request in a body.

    Raises:
        Refused: 400, it is not JSON, nested too deep, or not what the reader takes.
    """
    return reader(_json(body))


def read_packed(call: bytes) -> bytes:
    """For a process that reads: from a reader's name, a line break and a body to a request or a problem, packed."""
    name, _, body = call.partition(b"\n")
    try:
        found: Wire = read(body, READERS[name.decode()])
    except Refused as error:
        return packed(error.problem)
    return packed(found)


def _json(body: bytes) -> Any:
    try:
        value = json.loads(body)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise refused(f"the body is not JSON: {error}", None) from error
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and values(value) is None:
        raise _too_deep()
    return value


def _too_deep() -> Refused:
    return refused(f"the body is nested over {MAX_DEPTH} levels deep", None)
