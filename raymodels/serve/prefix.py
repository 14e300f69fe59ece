"""Keys and values of beginnings that were computed before: system prompts, examples, earlier turns of a conversation.

Kept in blocks of tokens, each under its tokens and the block before it, as vLLM does; the least recently used go first.
The first block of a text is under its adapter instead: what one has computed is of no use to another.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import torch

from raymodels.serve.kv_cache import KVCache, Row

BLOCK = 32


@dataclass(frozen=True, slots=True)
class _Block:
    """``stored`` has shape (layers, 2, key-value heads, BLOCK, head size)."""

    id: int
    stored: torch.Tensor


class PrefixCache:
    """Blocks, no more of them than a bound of positions allows."""

    def __init__(self, cache: KVCache, positions: int) -> None:
        self._cache, self._most = cache, positions // BLOCK
        self._blocks: OrderedDict[tuple[int | str | None, tuple[int, ...]], _Block] = OrderedDict()
        self._ids = count(1)

    @property
    def positions(self) -> int:
        """Positions held."""
        return len(self._blocks) * BLOCK

    def restore(self, tokens: list[int], row: Row, adapter: str | None = None) -> int:
        """Fill a row with what is known of a text's beginning; returns how many tokens that are.

        At least one token is left over: its logits say what comes next, and only keys and values are kept.
        """
        found = self._chain(tokens[: len(tokens) - 1], adapter)
        if found:
            self._cache.write_back(row, torch.cat([block.stored for block in found], dim=3))
        return len(found) * BLOCK

    def keep(self, tokens: list[int], row: Row, adapter: str | None = None) -> None:
        """Remember the whole blocks of a text whose keys and values are in a row, up to one that is not finite."""
        known = self._chain(tokens, adapter)
        parent = known[-1].id if known else adapter
        for begin in range(len(known) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            if not self._make_room():
                return
            stored = self._cache.read(row, begin, begin + BLOCK)
            if not stored.sum(dtype=torch.float32).isfinite():  # one NaN or infinity, and the sum is one
                return
            block = _Block(next(self._ids), stored)
            self._blocks[parent, tuple(tokens[begin : begin + BLOCK])] = block
            parent = block.id

    def drop(self) -> None:
        """Forget everything, for memory."""
        self._blocks.clear()

    def _chain(self, tokens: list[int], adapter: str | None) -> list[_Block]:
        """The known blocks that a text begins with."""
        keys, found = [], list[_Block]()
        parent: int | str | None = adapter
        for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = parent, tuple(tokens[begin : begin + BLOCK])
            if (block := self._blocks.get(key)) is None:
                break
            keys.append(key)
            found.append(block)
            parent = block.id
        for key in reversed(keys):  # a block is used no less recently than those after it, which are lost without it
            self._blocks.move_to_end(key)
        return found

    def _make_room(self) -> bool:
        if len(self._blocks) >= self._most and self._blocks:
            self._blocks.popitem(last=False)
        return len(self._blocks) < self._most
