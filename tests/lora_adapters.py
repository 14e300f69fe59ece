"""Random LoRA adapters in PEFT's format, made and computed by PEFT itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def random_adapter(folder: Path, model_dir: Path, seed: int = 3, **settings: Any) -> Path:
    """Writes an adapter for a model into ``folder``, with weights large enough to change the model's answers."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(base, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@functools.cache
def adapted(model_dir: Path, folder: Path, merged: bool = False) -> Any:
    """The base with an adapter, as PEFT computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(folder))
    return (model.merge_and_unload() if merged else model).eval()


@torch.inference_mode()
def adapted_scores(model_dir: Path, folder: Path, tokens: list[int], merged: bool = False) -> list[float]:
    """The log-probability of each token but the first."""
    rows = torch.log_softmax(adapted(model_dir, folder, merged)(torch.tensor([tokens])).logits[0], -1)
    scores: list[float] = rows[range(len(tokens) - 1), tokens[1:]].tolist()
    return scores
