"""A model as the default engine computes it: a forward pass over new tokens of many sequences, packed end to end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve import weights
from raymodels.serve.kv_cache import ATTENTION, KVCache, Segment, packed_attention
from raymodels.serve.lora import Adapters
from raymodels.serve.prefix import PrefixCache

log = logging.getLogger(__name__)
AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True, slots=True)
class Work:
    """The next tokens of one sequence, and for how many of them, the last ones, logits are wanted."""

    segment: Segment
    tokens: list[int]
    wanted: int
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """``logits`` has shape (all wanted, vocabulary); ``hidden``, where asked for, one (tokens, size) per `Work`."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None


class PackedModel:
    """A causal language model with its adapters and the memory for its keys and values.

    Args:
        adapters: name -> folder in PEFT's format.

    Raises:
        ServeError: the directory cannot be served with these settings; says why.
    """

    def __init__(self, model_dir: str, config: EngineConfig, adapters: Mapping[str, str]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(model_dir, config.dtype, device)
        self._adapters = Adapters(self._model, adapters)
        weights.prepare(self._model, config.quantization)
        self.vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        memory = config.kv_memory or _spare_memory(device)
        prefix_memory = memory * config.prefix_cache
        self.cache = KVCache(_kv_shape(self._model.config), self._model.dtype, device, memory - prefix_memory)
        self.prefixes = PrefixCache(self.cache, int(prefix_memory // self.cache.position_bytes))
        self.context = _context(self._model.config, config.max_context, self.cache.longest)

    def forward(self, works: list[Work], hidden: bool = False) -> Output:
        """One pass. Works of a single token come first, in order of `KVCache.place`.

        Args:
            hidden: whether the last layer's hidden states are asked for.
        """
        ends = torch.tensor([len(work.tokens) for work in works]).cumsum(0).tolist()
        wanted = [at for work, end in zip(works, ends, strict=True) for at in range(end - work.wanted, end)]
        positions = self.cache.plan([work.segment for work in works])
        self._adapters.plan([(work.adapter, len(work.tokens), work.wanted) for work in works])
        device = self.cache.device
        output = self._model(
            input_ids=torch.tensor([[token for work in works for token in work.tokens]], device=device),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=hidden,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            kv_cache=self.cache,
        )
        states = output.hidden_states[-1][0].split([len(work.tokens) for work in works]) if hidden else None
        return Output(output.logits[0], states)

    @torch.inference_mode()
    def prove(self) -> None:
        """Compare logits over the cache with the model's own.

        Raises:
            ServeError: they differ: this architecture cannot be batched here.
        """
        count = min(8, self.context)
        tokens = [at % self.vocabulary for at in range(count)]
        self._model.set_attn_implementation("sdpa")
        asked = torch.tensor([tokens], device=self.cache.device)
        expected = self._model(input_ids=asked, use_cache=False).logits[0].float()
        self._model.set_attn_implementation(ATTENTION)
        row = self.cache.row(count)
        assert row is not None
        parts = [(0, tokens[: count // 2]), *((at, [tokens[at]]) for at in range(count // 2, count))]
        works = [Work(Segment(row, at, len(part)), part, len(part)) for at, part in parts if part]
        found = torch.cat([self.forward([work]).logits for work in works]).float()
        self.cache.free(row)
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not error < (1e-3 if self._model.dtype == torch.float32 else 5e-2):
            name = type(self._model).__name__
            raise ServeError(f"{name} cannot be batched by this engine: its logits differ by {error:.1e} of their size")


def _load(model_dir: str, dtype: str, device: torch.device) -> Any:
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # half precision is emulated, slowly, on most CPUs
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ServeError(f"cannot load a causal language model from {model_dir}: {error}") from error
    return model.to(device).eval()


def _kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _spare_memory(device: torch.device) -> float:
    """What keys and values may take where ``engine.kv_memory`` is not set, once the weights are loaded."""
    if device.type == "cuda":
        return 0.8 * float(torch.cuda.mem_get_info(device)[0])
    return min(4e9, 0.25 * float(psutil.virtual_memory().available))


def _context(config: Any, limit: int | None, fits: int) -> int:
    positions = int(config.max_position_embeddings)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        positions = min(positions, int(window))  # within the window, every token sees all before it
    if limit is not None and limit > positions:
        raise ServeError(f"engine.max_context {limit} is over the model's {positions} positions: lower it")
    if not fits:
        raise ServeError("engine.kv_memory does not hold a single sequence: raise it")
    if limit is not None and limit > fits:
        raise ServeError(f"engine.max_context {limit} is over the {fits} tokens that engine.kv_memory holds: raise it")
    if limit is None and positions > fits:
        log.warning("the context is cut from %d to the %d tokens that engine.kv_memory holds", positions, fits)
    return limit or min(positions, fits)
