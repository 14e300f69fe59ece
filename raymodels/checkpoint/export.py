"""A committed checkpoint of any ZeRO stage -> a model directory in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raymodels import manifest, storage
from raymodels.checkpoint import layout, rest
from raymodels.checkpoint.shards import Shards
from raymodels.errors import CheckpointError
from raymodels.models.build import DTYPES

SHARD_BYTES = 2 << 30


def export(
    checkpoint: layout.Checkpoint,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config, tokenizer and safetensors that ``from_pretrained`` loads as they are.

    Weights are read one by one and written one file at a time, so no more than ``shard_bytes`` of them are in memory at
    once. They are the fp32 master weights.

    Args:
        target: a new or empty local folder.
        dtype: of the written weights; default: the precision that was trained in.

    Raises:
        IntegrityError: a file of the checkpoint is missing or changed.
        CheckpointError: the checkpoint's tensors are not those of its model config, or ``target`` is not empty.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty: export to a new folder")
    files = manifest.verify(checkpoint.place)
    state = checkpoint.state()
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        if name.startswith(f"{layout.MODEL}/"):
            (target / storage.name(name)).write_bytes(storage.read_bytes(storage.join(checkpoint.place, name)))
    dtype = dtype or DTYPES[state.precision]
    config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    config.dtype = dtype
    config.architectures = [_skeleton(config).__class__.__name__]
    config.save_pretrained(target)
    _write(_checked(_lazy_weights(checkpoint.place), config), target, dtype, shard_bytes)
    return target


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def _lazy_weights(place: str) -> dict[str, Lazy]:
    shards = Shards(place)
    weights = {name: Lazy(shape, partial(shards.weight, name)) for name, shape in shards.shapes.items()}
    for name, tensor in rest.read(place).items():
        weights[name] = Lazy(tuple(tensor.shape), tensor.clone)
    return weights


def _checked(weights: dict[str, Lazy], config: Any) -> dict[str, Lazy]:
    """The weights that a model directory holds: tied ones once, each of the shape that the config says."""
    skeleton = _skeleton(config)
    tied = set(skeleton.all_tied_weights_keys)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items() if name not in tied}
    found = {name: weights[name] for name in expected if name in weights}
    wrong = [name for name, shape in expected.items() if name not in found or found[name].shape != shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not hold the model that its config describes: {', '.join(wrong[:5])}"
        )
    return found


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _write(weights: dict[str, Lazy], target: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    files = _shards({name: prod(w.shape) * dtype.itemsize for name, w in weights.items()}, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file({name: weights[name].read().to(dtype) for name in names}, target / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(prod(w.shape) for w in weights.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where the next would pass the limit; a larger tensor has a file of its own."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
