"""The training state of a committed checkpoint, read by the piece: any range of any parameter, from any storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import torch

from raymodels import manifest, storage
from raymodels.checkpoint import layout, tensors
from raymodels.checkpoint.fragments import KINDS, Fragment
from raymodels.errors import CheckpointError

READERS = 16
SUFFIX = ".safetensors"
Headers = dict[str, tuple[dict[str, tuple[int, int]], dict[str, Any]]]
"""By file: its tensors as name -> (first byte in the file, elements), and its metadata."""


def file_name(rank: int, world_size: int, writer: str) -> str:
    """Where a rank writes its fragments.

    Args:
        writer: names the process among all that may save this step: one that was given up with its attempt may still be
            writing, on a host that is cut off, when the next attempt has come to the same step.
    """
    return f"{layout.ZERO}/shard-{rank:05d}-of-{world_size:05d}-{writer}{SUFFIX}"


def metadata(fragments: list[Fragment]) -> dict[str, dict[str, tuple[int, tuple[int, ...]]]]:
    """What a shard's file says of its fragments: name -> (start, shape of the whole parameter)."""
    return {"fragments": {fragment.name: (fragment.start, fragment.shape) for fragment in fragments}}


def read_headers(place: str, share: tuple[int, int] = (0, 1)) -> Headers:
    """What the shards of a checkpoint say that they hold, by file.

    Args:
        share: ``(i, n)`` reads every n-th shard from the i-th on, for n processes that open a checkpoint together.
    """
    index, count = share
    files = sorted(f for f in manifest.read(place) if f.startswith(f"{layout.ZERO}/shard-"))[index::count]
    with ThreadPoolExecutor(READERS) as pool:
        headers = pool.map(lambda name: tensors.read_header(storage.join(place, name)), files)
        return dict(zip(files, headers, strict=True))


class Shards:
    """All shards of a checkpoint as one. ``shapes`` are the parameters' whole shapes by name.

    Args:
        headers: of all shards; read here unless given.

    Raises:
        CheckpointError: the fragments do not make whole parameters.
    """

    def __init__(self, place: str, headers: Headers | None = None) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tensors.Piece]] = {}
        for file, (found, said) in (read_headers(place) if headers is None else headers).items():
            for name, (start, shape) in said["fragments"].items():
                self.shapes[name] = tuple(shape)
                for kind in KINDS:
                    byte, numel = found[f"{kind}/{name}"]
                    piece = tensors.Piece(storage.join(place, file), start, numel, byte)
                    self._pieces.setdefault(f"{kind}/{name}", []).append(piece)
        for key, pieces in self._pieces.items():
            # One without elements, of a parameter smaller than the ranks, begins where the next does.
            pieces.sort(key=lambda piece: (piece.start, piece.numel))
            _check_cover(place, key, pieces, prod(self.shapes[key.partition("/")[2]]))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements ``[start, start + numel)`` of a flattened parameter's master weights or moments; float32."""
        return tensors.read(self._pieces[f"{kind}/{name}"], start, numel)

    def weight(self, name: str) -> torch.Tensor:
        """A whole master weight, in its own shape."""
        shape = self.shapes[name]
        return self.read("master", name, 0, prod(shape)).view(shape)


def _check_cover(place: str, key: str, pieces: list[tensors.Piece], numel: int) -> None:
    end = 0
    for piece in pieces:
        if piece.start != end:
            raise CheckpointError(f"{place} holds {key} with a gap or an overlap at element {min(end, piece.start)}")
        end += piece.numel
    if end != numel:
        raise CheckpointError(f"{place} holds {end} of {numel} elements of {key}")
