"""A committed checkpoint of any ZeRO stage -> a model directory in Hugging Face layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raymodels import manifest, storage
from raymodels.checkpoint import layout
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

    Weights are read from memory-mapped shards and written one file at a time, so no more than ``shard_bytes`` of them
    are in memory at once. For stages 1 to 3 they are the fp32 master weights.

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
    manifest.verify(checkpoint.place)
    with ExitStack() as stack:
        source = _local(checkpoint.place, stack)
        state = checkpoint.state()
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source / layout.MODEL, target, dirs_exist_ok=True)
        dtype = dtype or DTYPES[state.precision]
        config = AutoConfig.from_pretrained(target)
        config.dtype = dtype
        config.architectures = [_skeleton(config).__class__.__name__]
        config.save_pretrained(target)
        _write(_checked(_lazy_weights(source, state.zero_stage), config), target, dtype, shard_bytes)
    return target


def _lazy_weights(source: Path, stage: int) -> dict[str, Any]:
    """Name -> something with ``shape`` and ``contiguous()``; nothing is read yet."""
    if stage == 0:
        [file] = (source / layout.ZERO).glob("mp_rank_*_model_states.pt")
        weights: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
        return weights
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading files needs no other, and the import asks for one
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        lazy: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(source), tag=layout.ZERO, lazy_mode=True)
    return lazy


def _checked(weights: dict[str, Any], config: Any) -> dict[str, Any]:
    """The weights that a model directory holds: tied ones once, each of the shape that the config says."""
    skeleton = _skeleton(config)
    tied = set(skeleton.all_tied_weights_keys)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items() if name not in tied}
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


def _write(weights: dict[str, Any], target: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    files = _shards({name: w.shape.numel() * dtype.itemsize for name, w in weights.items()}, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file({name: weights[name].contiguous().to(dtype) for name in names}, target / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(w.shape.numel() for w in weights.values()) * dtype.itemsize
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


def _local(place: str, stack: ExitStack) -> Path:
    if storage.is_local(place):
        return storage.local_path(place)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in manifest.read(place):
        storage.copy_file(storage.join(place, name), str(folder / name))
    return folder
