"""How tests ask an engine, and what transformers itself answers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymodels.serve.engine import Delta, Engine, GenerateRequest, Sampling

GREEDY = Sampling(temperature=0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def deltas(engine: Engine, prompt: str | list[int], id: str = "r", **changes: Any) -> list[Delta]:
    tokens = engine.text.encode(prompt) if isinstance(prompt, str) else prompt
    request = GenerateRequest(id, tokens, **{"max_tokens": 24, "sampling": GREEDY, **changes})
    return [delta async for delta in engine.generate(request)]


async def texts(engine: Engine, prompt: str, id: str = "r", **changes: Any) -> list[str]:
    found = [""] * changes.get("n", 1)
    for delta in await deltas(engine, prompt, id, **changes):
        found[delta.choice] += delta.text
    return found


async def all_texts(engine: Engine, prompts: list[str]) -> list[str]:
    found = await asyncio.gather(*(texts(engine, prompt, str(at)) for at, prompt in enumerate(prompts)))
    return [text for (text,) in found]


@functools.cache
def loaded(model_dir: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)


def reference(model_dir: Path, prompt: str, new: int = 24) -> str:
    model, tokenizer = loaded(model_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def reference_scores(model_dir: Path, tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of every token of the vocabulary after each of ``tokens``: [tokens, vocabulary]."""
    with torch.inference_mode():
        return torch.log_softmax(loaded(model_dir)[0](torch.tensor([tokens])).logits[0], -1)
