"""Linear layers as an engine computes them: packed for the CPU, or with int8 weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

PACKED_ROWS = 32
"""The number of rows that the packed layout is chosen for: decoding takes a row a sequence."""


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it, which multiplies a few rows about twice as fast."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and a scale for each output: symmetric, rounded to nearest.

    The product is computed in bfloat16, in which PyTorch has it for CPUs and GPUs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self._weight = (weight / scales[:, None]).round().to(torch.int8)
        self._scales = scales.to(torch.bfloat16)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).to(torch.bfloat16)
        out = torch._weight_int8pack_mm(flat, self._weight, self._scales).to(rows.dtype)
        out = out.reshape(*rows.shape[:-1], -1)
        return out if self._bias is None else out + self._bias


def prepare(model: nn.Module, quantization: Literal["none", "int8"]) -> None:
    """Replace a model's linear layers, one by one, by those that serve it.

    Embeddings and an output head that shares their weights keep theirs: the head is a matrix of its own from then on.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if quantization == "int8":
        kind: type[nn.Module] | None = Int8Linear
    else:
        kind = PackedLinear if on_cpu and torch._C._has_mkldnn else None
    if kind is None:
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child))
