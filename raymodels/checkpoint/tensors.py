"""Flat float32 tensors in safetensors files, written as a stream and read by the piece.

The format is safetensors' (https://huggingface.co/docs/safetensors/index#format): the header's length as eight bytes,
little endian, the header as JSON, the data. Its own library takes all tensors of a file into memory a second time to
write them, and reads from local disk only; here they go out buffer by buffer, hashed on the way, and any range comes
back from any storage.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import torch

from raymodels import storage
from raymodels.errors import CheckpointError
from raymodels.manifest import Entry

LENGTH = struct.Struct("<Q")
ITEM_BYTES = 4
CHUNK = 16 << 20


@dataclass(frozen=True)
class Piece:
    """Where ``numel`` elements of a larger flat tensor, from element ``start`` on, lie: in a file, from a byte on."""

    file: str
    start: int
    numel: int
    byte: int


def write(place: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Entry:
    """Write contiguous one-dimensional float32 CPU tensors to one file, durably; returns its size and SHA-256.

    Args:
        metadata: JSON values; stored as safetensors' own string metadata.

    Raises:
        StorageError: the file could not be written.
    """
    digest, size = hashlib.sha256(), 0
    with storage.create_stream(place) as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return Entry(size=size, sha256=digest.hexdigest())


def _pieces(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Any:
    header: dict[str, Any] = {"__metadata__": {key: json.dumps(value) for key, value in metadata.items()}}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.is_contiguous(), name
        begin, end = end, end + tensor.numel() * ITEM_BYTES
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin at a multiple of eight bytes
    yield LENGTH.pack(len(encoded)) + encoded
    for tensor in tensors.values():
        view = tensor.numpy().data.cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


def read_header(place: str) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """The tensors of a file as name -> (first byte in the file, elements), and its metadata.

    Raises:
        CheckpointError: the file is not one of ours.
        StorageError: it cannot be read.
    """
    [length] = LENGTH.unpack(storage.read_range(place, 0, LENGTH.size))
    try:
        header = json.loads(storage.read_range(place, LENGTH.size, length))
        metadata = {key: json.loads(value) for key, value in header.pop("__metadata__").items()}
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{place} is not a checkpoint's file: {error}") from error
    data = LENGTH.size + length
    return {name: (data + at["data_offsets"][0], at["shape"][0]) for name, at in header.items()}, metadata


def read(pieces: list[Piece], start: int, numel: int) -> torch.Tensor:
    """Elements ``[start, start + numel)`` of a flat tensor whose sorted pieces cover them; float32 [numel]."""
    found = torch.empty(numel, dtype=torch.float32)
    end = start + numel
    for piece in pieces:
        begin, stop = max(start, piece.start), min(end, piece.start + piece.numel)
        if begin < stop:
            first = piece.byte + (begin - piece.start) * ITEM_BYTES
            raw = storage.read_range(piece.file, first, (stop - begin) * ITEM_BYTES)
            found[begin - start : stop - start] = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    return found
