"""Greedy text does not depend on what runs beside it, nor on what was computed before."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raymodels.config import EngineConfig
from raymodels.serve.transformers_engine import TransformersEngine
from tests.unit.engines import run, texts

pytestmark = pytest.mark.slow

WORDS = ["the", "model", "reads", "a", "line", "and", "learns", "naïve", "café", "模型", "größer", "🙂"]
PROMPTS = 32


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with weights large enough for its answers to differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(11)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **positions, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def forgetful(model_dir: Path) -> Iterator[TransformersEngine]:
    """An engine that keeps no prefixes."""
    engine = TransformersEngine(str(model_dir), EngineConfig(max_batch=32, prefill_chunk=50, prefix_cache=0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(forgetful: TransformersEngine) -> list[str]:
    """Every prompt's text, one request at a time."""
    found = [run(texts(forgetful, prompt))[0] for prompt in prompts()]
    assert len(set(found)) > PROMPTS // 2
    return found


def prompts() -> list[str]:
    """Of all lengths; every fourth begins in the same way."""
    draw = random.Random(5)
    beginnings = [" ".join(draw.choices(WORDS, k=40)) for _ in range(4)]
    return [beginnings[at % 4] + " ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for at in range(PROMPTS)]


async def crowd(engine: TransformersEngine, width: int) -> list[str]:
    """Every prompt's text, in a random order, ``width`` requests at once: as one ends, another one's prompt begins."""
    places, found = asyncio.Semaphore(width), [""] * PROMPTS

    async def ask(at: int, prompt: str) -> None:
        async with places:
            [found[at]] = await texts(engine, prompt, str(at))

    order = random.Random(width).sample(list(enumerate(prompts())), PROMPTS)
    await asyncio.gather(*(ask(at, prompt) for at, prompt in order))
    return found


@pytest.mark.parametrize("width", [8, 32])
def test_in_batches(forgetful: TransformersEngine, alone: list[str], width: int) -> None:
    assert run(crowd(forgetful, width)) == alone


def test_after_the_prefixes_are_known(model_dir: Path, alone: list[str]) -> None:
    engine = TransformersEngine(str(model_dir), EngineConfig(max_batch=32, prefill_chunk=50))
    for width in (1, 8, 32):
        assert run(crowd(engine, width)) == alone
    assert engine.stats().prefix_hits > engine.stats().prefix_queries / 2
    engine.close()
