"""LoRA adapters in PEFT's format, read strictly: what would change the numbers and is not computed here is refused.

LoRA (Hu et al., 2021) adds to a linear layer's product with the weight W that of two small matrices:
y = W x + s B A x, with s = lora_alpha / r, or with rank-stabilised scaling (Kalajdzievski, 2023) lora_alpha / sqrt(r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raymodels.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What the settings may be that are none of the numbers below.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other beginnings, such as PiSSA's, change the weights of the base as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}
NUMBERS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# How it was trained and where it comes from. The names of the weights say which layers it is for.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("eva_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What one layer gains. ``down`` has shape (inputs, r), ``up`` (r, outputs) and holds the scale."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Settings:
    """The numbers of an adapter's config."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    fan_in_fan_out: bool = False

    def of(self, layer: str) -> tuple[int, float]:
        """A layer's rank and scale."""
        rank = int(_patterned(self.rank_pattern, layer, self.r))
        alpha = _patterned(self.alpha_pattern, layer, self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter(name: str, folder: str, model: nn.Module) -> dict[str, Pair]:
    """What an adapter adds to which linear layers of a model; the model may be on the device ``meta``.

    Args:
        name: for messages.

    Raises:
        AdapterError: it is not one for this model, or not one that can be computed here; names the part at fault.
    """
    settings, weights = _read_settings(name, folder), _read_weights(name, folder)
    layers, halves = dict(model.named_modules()), dict[str, dict[str, torch.Tensor]]()
    for key, weight in weights.items():
        found = KEY.fullmatch(key)
        if found is None:
            raise AdapterError(f"adapter {name}: {key} is not a LoRA weight of a linear layer: only those are served")
        layer, half = found.groups()
        if layer not in layers:
            raise AdapterError(f"adapter {name}: {key} matches nothing in the base model: is it for another one?")
        halves.setdefault(layer, {})[half] = weight
    pairs = {}
    for layer, found_halves in halves.items():
        if found_halves.keys() != {"A", "B"}:
            raise AdapterError(f"adapter {name}: of {layer} there is lora_{min(found_halves)} alone in {WEIGHTS}")
        pairs[layer] = _pair(f"adapter {name}: {layer}", layers[layer], found_halves, *settings.of(layer))
        if settings.fan_in_fan_out and not isinstance(layers[layer], Conv1D):
            raise AdapterError(
                f"adapter {name}: fan_in_fan_out is true, and {layer} of the base is no Conv1D: set false"
            )
    return pairs


def check_adapter(name: str, folder: str, base_config: str) -> None:
    """Read an adapter for the model that a folder with a ``config.json`` describes; raises as `read_adapter`."""
    try:
        config = AutoConfig.from_pretrained(base_config, trust_remote_code=False)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"adapter {name}: its base is no causal language model that is known here: {error}"
        ) from error
    read_adapter(name, folder, base)


def highest_rank(name: str, folder: str) -> int:
    """The largest rank of an adapter's layers; raises as `read_adapter`."""
    return max(weight.shape[0] for key, weight in _read_weights(name, folder).items() if ".lora_A." in key)


def _read_settings(name: str, folder: str) -> _Settings:
    try:
        raw = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter {name}: {folder} is not in PEFT's format: {CONFIG}: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"adapter {name}: {CONFIG} holds no settings")
    for key, value in raw.items():
        if key in ALLOWED:
            if value not in ALLOWED[key]:
                allowed = " or ".join(json.dumps(each) for each in ALLOWED[key])
                raise AdapterError(f"adapter {name}: {key} {json.dumps(value)} is not supported, only {allowed}")
        elif key not in HARMLESS and key not in NUMBERS and value:
            raise AdapterError(f"adapter {name}: {key} is set in {CONFIG}, which is not supported: train it without")
    settings = {key: raw[key] for key in NUMBERS if raw.get(key) is not None}
    for key, value in settings.items():
        if not _fits(key, value):
            raise AdapterError(f"adapter {name}: {key} {json.dumps(value)} in {CONFIG} is not a usable value")
    if missing := {"r", "lora_alpha"} - settings.keys() or {"peft_type"} - raw.keys():
        raise AdapterError(f"adapter {name}: {CONFIG} lacks {min(missing)}")
    return _Settings(**settings)


def _fits(key: str, value: Any) -> bool:
    if key in ("use_rslora", "fan_in_fan_out"):
        return isinstance(value, bool)
    if key.endswith("_pattern"):
        one = "r" if key == "rank_pattern" else "lora_alpha"
        return isinstance(value, dict) and all(_compiles(each) and _fits(one, value[each]) for each in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) and value > 0 if key == "r" else math.isfinite(value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _patterned(pattern: Mapping[str, float] | None, layer: str, default: float) -> float:
    """As PEFT's `get_pattern_key`: the first pattern that the layer's name, or its end after a dot, matches."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)


def _read_weights(name: str, folder: str) -> dict[str, torch.Tensor]:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"adapter {name}: {folder} has no {WEIGHTS}: save it with safe_serialization=True")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"adapter {name}: {path} cannot be read: {error}") from error
    if not weights:
        raise AdapterError(f"adapter {name}: {path} is empty")
    return weights


def _pair(where: str, layer: nn.Module, halves: dict[str, torch.Tensor], rank: int, scale: float) -> Pair:
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
    elif type(layer) is nn.Linear:
        outputs, inputs = layer.weight.shape
    else:
        raise AdapterError(f"{where} is a {type(layer).__name__}: only linear layers can be adapted")
    for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        if halves[half].shape != shape:
            found = tuple(halves[half].shape)
            raise AdapterError(f"{where}: lora_{half} has shape {found}, and rank {rank} on this base needs {shape}")
    return Pair(halves["A"].T.contiguous(), (halves["B"].float() * scale).T.contiguous())
