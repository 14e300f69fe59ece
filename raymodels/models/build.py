"""Build a causal language model from a config, or load one from a directory or hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from raymodels.config import ModelConfig
from raymodels.errors import ConfigError

Whole = AbstractContextManager[Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def architecture(model: ModelConfig, *, vocab_size: int, seq_len: int, eos_id: int) -> PreTrainedConfig:
    """The transformers config of a model: its own where it starts from one, else of the shape given.

    Raises:
        ConfigError: the starting point cannot be read, or does not fit the tokenizer or ``seq_len``.
    """
    if model.from_ is None:
        shape = _gpt2(model, seq_len) if model.arch == "gpt2" else _llama_like(model, seq_len)
        return AutoConfig.for_model(
            model.arch, vocab_size=vocab_size, bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id, **shape
        )
    try:
        config = AutoConfig.from_pretrained(model.from_, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.from {model.from_}: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model.from {model.from_} is a {config.model_type}, not a causal language model")
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.from {model.from_} has {config.vocab_size} embeddings, the tokenizer {vocab_size} tokens: "
            "use the model's own tokenizer (remove data.tokenizer)"
        )
    if seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len {seq_len} is over the {config.max_position_embeddings} positions of model.from {model.from_}"
        )
    return config


def construct(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape whose weights are not set yet; see `initialize`."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def load(directory: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the weights of a directory or hub id, from safetensors: pickled weights may be programs."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    model.config.use_cache = False
    return model


def initialize(model: PreTrainedModel, seed: int, whole: Callable[[list[torch.nn.Parameter]], Whole]) -> None:
    """Set all weights as the architecture prescribes, each module's from ``seed`` and its own name.

    So they do not depend on how parameters are partitioned, nor on what else draws random numbers.

    Args:
        whole: a context in which these parameters are whole on every process, and are written back as process 0 left
            them; for a model that is not partitioned, `contextlib.nullcontext`.
    """

    def visit(name: str, module: torch.nn.Module, owner: PreTrainedModel) -> None:
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}", child, child if isinstance(child, PreTrainedModel) else owner)
        # A module may set its direct children's weights too, as GPT-2's attention scales its projection's.
        reach = [
            *module.parameters(recurse=False),
            *(p for c in module.children() for p in c.parameters(recurse=False)),
        ]
        with torch.no_grad(), whole(reach):
            _seed(int.from_bytes(hashlib.sha256(f"{seed}{name}".encode()).digest()[:8]))
            owner._init_weights(module)

    visit("", model, model)
    model.tie_weights()


def _seed(seed: int) -> None:
    """As `torch.manual_seed`, which keeps each call and its stack for every kind of device that is not in use yet."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of a model of this shape, tied ones counted once; computed without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def flops_per_token(config: PreTrainedConfig, parameters: int, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward.

    6 N + 12 layers x hidden x seq_len, after PaLM (Chowdhery et al., 2022, appendix B), with N without the input
    embedding where it is a table of its own. Recomputed activations are not counted.
    """
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return float(6 * (parameters - table) + attention)


def _llama_like(model: ModelConfig, seq_len: int) -> dict[str, Any]:
    assert model.hidden_size and model.heads
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.hidden_size // model.heads,
        "intermediate_size": model.intermediate_size or _rounded(model.hidden_size * 8 // 3),
        "max_position_embeddings": model.max_positions or seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.dropout,
    }


def _gpt2(model: ModelConfig, seq_len: int) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.intermediate_size,
        "n_positions": model.max_positions or seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


def _rounded(size: int, multiple: int = 64) -> int:
    return -(-size // multiple) * multiple
