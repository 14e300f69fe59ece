"""What a model holds beside its trained parameters: frozen ones and persistent buffers. Small, written by rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import load, save

from raymodels import manifest, storage
from raymodels.checkpoint import layout
from raymodels.checkpoint.shards import SUFFIX

NAME = f"{layout.ZERO}/rest"


def file_name(writer: str) -> str:
    """Where rank 0 writes it; ``writer`` as in `raymodels.checkpoint.shards.file_name`."""
    return f"{NAME}-{writer}{SUFFIX}"


def read(place: str) -> dict[str, torch.Tensor]:
    """What a committed checkpoint holds of it, by name."""
    found = [file for file in manifest.read(place) if file.startswith(NAME)]
    return load(storage.read_bytes(storage.join(place, found[0]))) if found else {}


def copy_rest(engine: Any) -> dict[str, torch.Tensor]:
    """Copies on the CPU. Collective where ZeRO-3 has partitioned frozen parameters."""
    found = {}
    for name, tensor in _rest(engine.module):
        with _gathered(tensor):
            found[name] = tensor.detach().cpu().clone()
    return found


def to_bytes(rest: dict[str, torch.Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in rest.items()})


def load_rest(engine: Any, place: str) -> None:
    """Set them from a checkpoint. Collective."""
    named = list(_rest(engine.module))
    if not named:
        return
    saved = read(place)
    for name, tensor in named:
        with _gathered(tensor, written=True):
            tensor.data.copy_(saved[name])


def _rest(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    persistent = module.state_dict().keys()
    yield from ((name, param) for name, param in module.named_parameters() if not param.requires_grad)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _gathered(tensor: torch.Tensor, written: bool = False) -> AbstractContextManager[Any]:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        [tensor], modifier_rank=0 if written else None
    )
    return gathered
