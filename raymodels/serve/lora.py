"""Low-rank adapters in a packed forward pass: every token's row gains what the adapter of its sequence adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from raymodels.serve.adapters import Pair, read_adapter


@dataclass
class Rows:
    """Which rows of a layer's input belong to which adapter, in the forward pass that comes next."""

    of: dict[str, torch.Tensor] = field(default_factory=dict)

    def plan(self, parts: Sequence[tuple[str | None, int]], device: torch.device) -> None:
        """Parts lie one after the other: an adapter, none for the base alone, and a number of rows."""
        rows, start = dict[str, list[int]](), 0
        for adapter, count in parts:
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(start, start + count))
            start += count
        self.of = {adapter: torch.tensor(found, dtype=torch.long, device=device) for adapter, found in rows.items()}


class AdaptedLinear(nn.Module):
    """A linear layer and, by adapter, what it gains. Input and output have shape (1, rows, size)."""

    def __init__(self, linear: nn.Module, pairs: dict[str, Pair], rows: Rows) -> None:
        super().__init__()
        self.linear = linear
        self._pairs, self._rows = pairs, rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(inputs)
        for adapter, rows in self._rows.of.items():
            if pair := self._pairs.get(adapter):
                out[0].index_add_(0, rows, inputs[0, rows] @ pair.down @ pair.up)
        return out


class Adapters:
    """The adapters of one model, put into its linear layers.

    Args:
        folders: name -> folder in PEFT's format.

    Raises:
        AdapterError: an adapter cannot be used with this model; says why.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, str]) -> None:
        self.names = frozenset(folders)
        self._tokens, self._wanted = Rows(), Rows()
        weight = next(model.parameters())
        self._device = weight.device
        layers: dict[str, dict[str, Pair]] = {}
        for name, folder in folders.items():
            for layer, pair in read_adapter(name, folder, model).items():
                layers.setdefault(layer, {})[name] = Pair(pair.down.to(weight), pair.up.to(weight))
        head = model.get_output_embeddings()  # type: ignore[operator]
        for layer, pairs in layers.items():
            parent, _, name = layer.rpartition(".")
            linear = model.get_submodule(layer)
            rows = self._wanted if linear is head else self._tokens
            setattr(model.get_submodule(parent), name, AdaptedLinear(linear, pairs, rows))

    def plan(self, parts: Sequence[tuple[str | None, int, int]]) -> None:
        """Prepare one forward pass.

        Args:
            parts: of every sequence in it, the adapter, the number of tokens and that of the logits wanted.
        """
        self._tokens.plan([(adapter, tokens) for adapter, tokens, _ in parts], self._device)
        self._wanted.plan([(adapter, wanted) for adapter, _, wanted in parts], self._device)
