"""Requests between processes: what a large one holds many of is sealed, and no more than bytes until a replica has it.

Making a million objects holds up whatever runs beside it, even in another thread. So the process that has read a large
body seals those fields of the request that nobody but the replica looks into.
"""

from __future__ import annotations

import io
import pickle
from array import array
from typing import Any

from raymodels.serve.wire import Wire

OPAQUE = ("messages", "tokens", "logit_bias")
TEXTS = {"prompt": "prompts", "input": "inputs"}
"""Texts or token ids: field -> property with them as a list."""


class Sealed:
    """A value as bytes, which becomes the value itself where it is unpickled.

    Args:
        data: its pickle; token ids and what is given for them are arrays in it.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.data,)


def packed(read: Any) -> bytes:
    """What has been read of a body, for `unpacked`, with the large fields of a request sealed."""
    if isinstance(read, Wire):
        read = read.model_copy(update=_sealed(read))
    file = io.BytesIO()
    _Packer(file, pickle.HIGHEST_PROTOCOL).dump(read)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    """What has been read, in which what was sealed still is."""
    return _Unpacker(io.BytesIO(data)).load()


def _sealed(request: Wire) -> dict[str, Any]:
    changes: dict[str, Any] = {
        field: _seal(getattr(request, field)) for field in OPAQUE if getattr(request, field, None)
    }
    for field, texts in TEXTS.items():
        if hasattr(request, texts):
            changes[field] = [text if isinstance(text, str) else _seal(text) for text in getattr(request, texts)]
    return changes


def _seal(value: Any) -> Sealed:
    if isinstance(value, dict):
        value = array("i", map(int, value)), array("d", value.values())
    elif isinstance(value[0], int):
        value = array("i", value)
    return Sealed(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def _opened(data: bytes) -> Any:
    value = pickle.loads(data)
    if isinstance(value, array):
        return value.tolist()
    return dict(zip(*value, strict=True)) if isinstance(value, tuple) else value


class _Packer(pickle.Pickler):
    def persistent_id(self, value: Any) -> bytes | None:
        return value.data if isinstance(value, Sealed) else None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, data: bytes) -> Sealed:
        return Sealed(data)
