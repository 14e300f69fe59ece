"""Keys and values of all sequences in the batch, and attention over them, within a bound of memory.

Every sequence owns a row of a slab. A slab's tensors, one pair a layer, have shape (rows, key-value heads, positions,
head size); its positions are a power of two, and a sequence that outgrows them moves to a slab of longer rows. So at
most half of a row is unused, and rows of a slab are attended to together.

Positions that a row has not used are zeros, and those of a row that is given back become zeros again. Attention reads
some of them and multiplies them by 0, which makes NaN of a NaN: one sequence's would reach the next in its row.

One forward pass takes the new tokens of all sequences packed end to end: the linear layers see one long input and read
their weights once, and `attend` sends each sequence to its own row. Prompts and running streams share a pass, unpadded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

ATTENTION = "raymodels_packed"
MIN_POSITIONS = 128

Layer = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class Row:
    """A sequence's place. The cache changes ``index`` when it closes a gap, and ``positions`` when the row grows.

    ``used`` positions, the first ones, may hold something; all others are zeros.
    """

    positions: int
    index: int
    used: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence: ``count`` of them, from ``position`` on, for a row."""

    row: Row
    position: int
    count: int


@dataclass
class _Slab:
    """Rows of one length. ``layers`` are empty until the first keys come and tell the heads' shape."""

    positions: int
    rows: list[Row] = field(default_factory=list)
    capacity: int = 0
    layers: list[Layer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Singles:
    """A packed range of single tokens, of rows of one slab that lie side by side or are gathered."""

    packed: slice
    slab: _Slab
    rows: slice | torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor
    length: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A packed range that attends to one row, with its mask; none where it starts the row and is plainly causal."""

    packed: slice
    slab: _Slab
    row: slice
    begin: int
    end: int
    mask: torch.Tensor | None


class KVCache:
    """Rows of keys and values.

    Args:
        shape: layers, key-value heads and head size of the model.
        memory: bytes that all slabs together may take.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, memory: float) -> None:
        self.dtype, self.device = dtype, device
        self._shape = shape
        layers, heads, size = shape
        self.position_bytes = 2 * layers * heads * size * dtype.itemsize
        self.capacity = int(memory // self.position_bytes)
        self._slabs: dict[int, _Slab] = {}
        self._singles: list[_Singles] = []
        self._chunks: list[_Chunk] = []

    @property
    def longest(self) -> int:
        """Positions of the longest row that one sequence can always come to have, alone."""
        length = 0 if self.capacity < MIN_POSITIONS else MIN_POSITIONS
        while length and 2 * length <= self.capacity:
            length *= 2
        return length

    @property
    def used(self) -> int:
        """Positions of the rows that sequences own."""
        return sum(len(slab.rows) * slab.positions for slab in self._slabs.values())

    @property
    def allocated(self) -> int:
        """Positions that the slabs have memory for, used or not."""
        return sum(slab.capacity * slab.positions for slab in self._slabs.values())

    def row(self, positions: int) -> Row | None:
        """A new row with at least so many positions; none if there is no memory for it."""
        slab = self._slab(positions)
        if not self._make_room(slab):
            return None
        row = Row(slab.positions, len(slab.rows))
        slab.rows.append(row)
        return row

    def grow(self, row: Row, positions: int, used: int) -> bool:
        """Give a row at least so many positions, moving its ``used`` ones if need be; false if there is no memory."""
        if positions <= row.positions:
            return True
        target = self._slab(positions)
        if not self._make_room(target):
            return False
        old, index = self._slabs[row.positions], len(target.rows)
        for (keys, values), (new_keys, new_values) in zip(old.layers, target.layers, strict=True):
            new_keys[index, :, :used] = keys[row.index, :, :used]
            new_values[index, :, :used] = values[row.index, :, :used]
        self.free(row)
        target.rows.append(row)
        row.positions, row.index, row.used = target.positions, index, used
        return True

    def free(self, row: Row) -> None:
        """Give a row back. The slab's last row moves into the gap, so that rows stay side by side."""
        slab = self._slabs[row.positions]
        last = slab.rows.pop()
        gap, end = row.index, last.index
        for tensor in (tensor for layer in slab.layers for tensor in layer):
            if last is not row:
                tensor[gap, :, : last.used] = tensor[end, :, : last.used]
                tensor[gap, :, last.used : row.used] = 0
            tensor[end, :, : last.used] = 0
        if last is not row:
            slab.rows[gap], last.index = last, gap

    def copy(self, source: Row, target: Row, positions: int) -> None:
        """Make a row's first positions equal to another's."""
        olds, news = self._slabs[source.positions].layers, self._slabs[target.positions].layers
        for (keys, values), (new_keys, new_values) in zip(olds, news, strict=True):
            new_keys[target.index, :, :positions] = keys[source.index, :, :positions]
            new_values[target.index, :, :positions] = values[source.index, :, :positions]
        target.used = max(target.used, positions)

    def read(self, row: Row, begin: int, end: int) -> torch.Tensor:
        """A copy of a row's positions, shape (layers, 2, heads, positions, head size)."""
        layers = self._slabs[row.positions].layers
        parts = [tensor[row.index, :, begin:end] for layer in layers for tensor in layer]
        return torch.stack(parts).view(len(layers), 2, *parts[0].shape)

    def write_back(self, row: Row, stored: torch.Tensor) -> None:
        """Set a row's first positions to what `read` gave."""
        for (keys, values), (new_keys, new_values) in zip(
            self._slabs[row.positions].layers, stored.unbind(0), strict=True
        ):
            keys[row.index, :, : stored.shape[3]] = new_keys
            values[row.index, :, : stored.shape[3]] = new_values
        row.used = max(row.used, stored.shape[3])

    def plan(self, segments: list[Segment]) -> torch.Tensor:
        """Prepare one forward pass over packed segments: first those of one token, in order of `place`.

        Returns:
            The position of every packed token, shape (1, tokens), for the model.
        """
        positions = torch.tensor([s.position + i for s in segments for i in range(s.count)], device=self.device)
        self._singles, self._chunks, start = [], [], 0
        for segment in segments:
            segment.row.used = max(segment.row.used, segment.position + segment.count)
        for count, group in groupby(segments, key=lambda s: s.count if s.count > 1 else -s.row.positions):
            for part in [list(group)] if count < 0 else [[each] for each in group]:
                packed = slice(start, start + sum(each.count for each in part))
                start = packed.stop
                if count < 0:
                    self._singles.append(self._single(part, packed, positions[packed]))
                else:
                    self._chunks.append(self._chunk(part[0], packed, positions[packed]))
        return positions[None]

    @staticmethod
    def place(segment: Segment) -> tuple[int, int]:
        """Sorts segments of one token as `plan` wants them."""
        return segment.row.positions, segment.row.index

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a layer's packed keys and values, shape (1, heads, tokens, size), in their rows."""
        for single in self._singles:
            keys, values = single.slab.layers[layer]
            keys[single.indices, :, single.positions] = key[0, :, single.packed].transpose(0, 1)
            values[single.indices, :, single.positions] = value[0, :, single.packed].transpose(0, 1)
        for chunk in self._chunks:
            keys, values = chunk.slab.layers[layer]
            keys[chunk.row, :, chunk.begin : chunk.end] = key[:, :, chunk.packed]
            values[chunk.row, :, chunk.begin : chunk.end] = value[:, :, chunk.packed]

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of packed queries, shape (1, heads, tokens, size), over their rows; (1, tokens, heads, size)."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for single in self._singles:
            out[0, single.packed] = _attend_singles(query[0, :, single.packed], single, layer, scale)
        for chunk in self._chunks:
            keys, values = chunk.slab.layers[layer]
            mixed = sdpa(
                query[:, :, chunk.packed],
                keys[chunk.row, :, : chunk.end],
                values[chunk.row, :, : chunk.end],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            out[:, chunk.packed] = mixed.transpose(1, 2)
        return out

    def _single(self, segments: list[Segment], packed: slice, positions: torch.Tensor) -> _Singles:
        slab, rows = self._slabs[segments[0].row.positions], [s.row.index for s in segments]
        indices, length = torch.tensor(rows, device=self.device), max(s.position for s in segments) + 1
        # Rows that lie side by side are read where they are; otherwise they are gathered, layer by layer.
        side_by_side = rows == list(range(rows[0], rows[0] + len(rows)))
        chosen = slice(rows[0], rows[-1] + 1) if side_by_side else indices
        mask = self._additive(torch.arange(length, device=self.device) <= positions[:, None])
        return _Singles(packed, slab, chosen, indices, positions, length, mask[:, None, None, :])

    def _chunk(self, segment: Segment, packed: slice, positions: torch.Tensor) -> _Chunk:
        row, end = segment.row, segment.position + segment.count
        seen = torch.arange(end, device=self.device) <= positions[:, None]
        mask = self._additive(seen) if segment.position else None
        return _Chunk(packed, self._slabs[row.positions], slice(row.index, row.index + 1), segment.position, end, mask)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))

    def _slab(self, positions: int) -> _Slab:
        length = MIN_POSITIONS
        while length < positions:
            length *= 2
        return self._slabs.setdefault(length, _Slab(length))

    def _make_room(self, slab: _Slab) -> bool:
        """See that a slab has a free row. It doubles where there is memory to double, else it grows by one row."""
        if len(slab.rows) < slab.capacity:
            return True
        for capacity in (max(1, 2 * slab.capacity), slab.capacity + 1):
            if self.allocated + (capacity - slab.capacity) * slab.positions <= self.capacity:
                self._resize(slab, capacity)
                return True
        self._shrink()
        self._slabs[slab.positions] = slab
        if self.allocated + slab.positions <= self.capacity:
            self._resize(slab, slab.capacity + 1)
            return True
        return False

    def _shrink(self) -> None:
        """Give back the memory of all unused rows."""
        self._slabs = {length: slab for length, slab in self._slabs.items() if slab.rows}
        for slab in self._slabs.values():
            if slab.capacity > len(slab.rows):
                self._resize(slab, len(slab.rows))

    def _resize(self, slab: _Slab, capacity: int) -> None:
        layers, heads, size = self._shape
        kept = len(slab.rows)
        old: list[Layer | tuple[None, None]] = [*slab.layers] or [(None, None)] * layers
        # Layer by layer, so that no more than one layer is held twice.
        slab.layers = []
        for pair in old:
            new = torch.zeros(2, capacity, heads, slab.positions, size, dtype=self.dtype, device=self.device)
            for tensor, before in zip(new, pair, strict=True):
                if before is not None and kept:
                    tensor[:kept] = before[:kept]
            slab.layers.append((new[0], new[1]))
        slab.capacity = capacity


def _attend_singles(query: torch.Tensor, single: _Singles, layer: int, scale: float) -> torch.Tensor:
    """One query a row, shape (heads, rows, size) -> (rows, heads, size)."""
    keys, values = single.slab.layers[layer]
    heads, count, size = query.shape
    # Heads that share a key-value head are queries over the same keys: no key is repeated.
    grouped = query.transpose(0, 1).reshape(count, keys.shape[1], heads // keys.shape[1], size)
    rows, length = single.rows, single.length
    mixed = sdpa(grouped, keys[rows, :, :length], values[rows, :, :length], attn_mask=single.mask, scale=scale)
    return mixed.reshape(count, heads, size)


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
    kv_cache.write(layer, key, value)
    return kv_cache.attend(layer, query, scaling), None
