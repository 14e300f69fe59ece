"""Keys and values of all sequences in the batch, and attention over them.

Every sequence owns a row of each layer's tensors, shape (rows, key-value heads, positions, head size). One forward pass
takes the new tokens of all sequences packed end to end: the linear layers see one long input and read their weights
once, and `attend` sends each sequence to its own row. So prompts and running streams share a pass, unpadded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

ATTENTION = "raymodels_packed"
MIN_POSITIONS = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence: ``count`` of them, from ``position`` on, for a row."""

    row: int
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A packed range that attends to one row, with its mask; none where it starts the row and is plainly causal."""

    packed: slice
    row: int
    end: int
    mask: torch.Tensor | None


class KVCache:
    """Rows of keys and values that grow by doubling, in number and in length, up to what the batch needs."""

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self._rows = 1
        self._positions = MIN_POSITIONS

    def plan(self, segments: list[Segment]) -> torch.Tensor:
        """Prepare one forward pass over packed segments, those of one token first.

        Returns:
            The position of every packed token, shape (1, tokens), for the model.
        """
        self._reserve(max(s.row for s in segments) + 1, max(s.position + s.count for s in segments))
        rows = [s.row for s in segments for _ in range(s.count)]
        positions = [s.position + i for s in segments for i in range(s.count)]
        self._row_of = torch.tensor(rows, device=self.device)
        self._position_of = torch.tensor(positions, device=self.device)
        self._plan_singles([s for s in segments if s.count == 1])
        self._plan_chunks([s for s in segments if s.count > 1])
        return self._position_of[None]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the packed tokens, shape (1, heads, tokens, size), in their rows; returns the layer's tensors."""
        stored = self._layers[layer]
        if stored is None:
            # Zeros and not garbage: what a mask hides is multiplied by 0, and 0 x NaN is NaN.
            shape = (self._rows, key.shape[1], self._positions, key.shape[3])
            stored = (key.new_zeros(shape), value.new_zeros(shape))
            self._layers[layer] = stored
        keys, values = stored
        keys[self._row_of, :, self._position_of] = key[0].transpose(0, 1)
        values[self._row_of, :, self._position_of] = value[0].transpose(0, 1)
        return keys, values

    def copy(self, source: int, target: int, positions: int) -> None:
        """Make a row's first positions equal to another's."""
        self._reserve(max(source, target) + 1, positions)
        for keys, values in (stored for stored in self._layers if stored is not None):
            keys[target, :, :positions] = keys[source, :, :positions]
            values[target, :, :positions] = values[source, :, :positions]

    def _plan_singles(self, singles: list[Segment]) -> None:
        self._singles = len(singles)
        if not singles:
            return
        length = max(s.position for s in singles) + 1
        rows = [s.row for s in singles]
        # Rows that lie side by side in order are read where they are; otherwise they are gathered, layer by layer.
        side_by_side = rows == list(range(rows[0], rows[0] + len(rows)))
        self._single_rows = slice(rows[0], rows[-1] + 1) if side_by_side else torch.tensor(rows, device=self.device)
        self._single_length = length
        seen = torch.arange(length, device=self.device) <= self._position_of[: len(singles), None]
        self._single_mask = self._additive(seen)[:, None, None, :]

    def _plan_chunks(self, chunks: list[Segment]) -> None:
        self._chunks = []
        start = self._singles
        for chunk in chunks:
            packed, end = slice(start, start + chunk.count), chunk.position + chunk.count
            seen = torch.arange(end, device=self.device) <= self._position_of[packed, None]
            mask = self._additive(seen) if chunk.position else None
            self._chunks.append(_Chunk(packed, chunk.row, end, mask))
            start += chunk.count

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of packed queries, shape (1, heads, tokens, size), over their rows; (1, tokens, heads, size)."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        if self._singles:
            out[0, : self._singles] = self._attend_singles(query[0, :, : self._singles], keys, values, scale)
        for chunk in self._chunks:
            row, end = slice(chunk.row, chunk.row + 1), chunk.end
            mixed = sdpa(
                query[:, :, chunk.packed],
                keys[row, :, :end],
                values[row, :, :end],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            out[:, chunk.packed] = mixed.transpose(1, 2)
        return out

    def _attend_singles(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        heads, count, size = query.shape
        # Heads that share a key-value head are queries over the same keys: no key is repeated.
        grouped = query.transpose(0, 1).reshape(count, keys.shape[1], heads // keys.shape[1], size)
        rows, length = self._single_rows, self._single_length
        mixed = sdpa(
            grouped, keys[rows, :, :length], values[rows, :, :length], attn_mask=self._single_mask, scale=scale
        )
        return mixed.reshape(count, heads, size)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))

    def _reserve(self, rows: int, positions: int) -> None:
        wanted = _doubled(self._rows, rows), _doubled(self._positions, positions)
        if wanted == (self._rows, self._positions):
            return
        self._rows, self._positions = wanted
        self._layers = [
            None if stored is None else (self._grown(stored[0]), self._grown(stored[1])) for stored in self._layers
        ]

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self._rows, old.shape[1], self._positions, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    kv_cache: KVCache,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call; ``kv_cache`` is what the model's forward was called with."""
    assert attention_mask is None
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = kv_cache.write(layer, key, value)
    return kv_cache.attend(query, keys, values, scaling), None
