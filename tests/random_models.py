"""Random models that all tiers serve: tiny, of any architecture, in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def random_model(folder: Path, tokenizer: Any, kind: str = "llama", seed: int = 11, **changes: Any) -> Path:
    """Writes a model of the tokenizer's vocabulary, and the tokenizer, into ``folder``.

    Its weights are large enough for the answers to differ from prompt to prompt.

    Args:
        kind: a ``model_type`` of transformers.
        changes: of the shape, by the names that transformers' configs have in common.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
