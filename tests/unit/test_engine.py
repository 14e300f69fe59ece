"""The default engine against transformers itself, on tiny models of every architecture that can be trained here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.engine import GenerateRequest, InvalidRequest, QueueFull, Sampling
from raymodels.serve.transformers_engine import TransformersEngine
from tests.unit.engines import GREEDY, all_texts, deltas, reference, run, texts

pytestmark = pytest.mark.slow

PROMPTS = ["the model reads", "模型", "naïve café größer " * 6, "x", "a line and learns what follows the model"]
SMALL = EngineConfig(max_batch=4, max_queue=8, prefill_chunk=7)
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS = dict(max_position_embeddings=256, num_key_value_heads=2, initializer_range=0.3, **SHAPE)
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda **ids: LlamaForCausalLM(LlamaConfig(**POSITIONS, **ids)),
    "qwen2": lambda **ids: Qwen2ForCausalLM(Qwen2Config(**POSITIONS, **ids)),
    "qwen3": lambda **ids: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **POSITIONS, **ids)),
    "gpt2": lambda **ids: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **ids)
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model_dir(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with weights large enough for its answers to differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(11)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    MODELS[request.param](**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(model_dir), SMALL)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def llama(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(tiny_model_dir), SMALL)
    yield engine
    engine.close()


def test_greedy_text_is_that_of_generate_alone_and_in_a_batch(engine: TransformersEngine, model_dir: Path) -> None:
    alone = [run(texts(engine, prompt))[0] for prompt in PROMPTS]
    assert alone == [reference(model_dir, prompt) for prompt in PROMPTS]
    assert run(all_texts(engine, PROMPTS * 2)) == alone * 2


def test_scores_are_those_of_the_model(engine: TransformersEngine, model_dir: Path) -> None:
    tokens = engine.text.encode(PROMPTS[2])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model_dir)(torch.tensor([tokens])).logits[0]
    expected = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]]
    assert run(engine.score(tokens)) == pytest.approx(expected.tolist(), abs=1e-4)


def test_logprobs_of_new_tokens_are_those_of_the_model(engine: TransformersEngine, model_dir: Path) -> None:
    found = run(deltas(engine, PROMPTS[0], logprobs=3, max_tokens=6))
    tokens = [token for delta in found for token in delta.tokens]
    ids = [*engine.text.encode(PROMPTS[0]), *(token.id for token in tokens)]
    with torch.inference_mode():
        rows = torch.log_softmax(AutoModelForCausalLM.from_pretrained(model_dir)(torch.tensor([ids])).logits[0], -1)
    for token, row in zip(tokens, rows[-len(tokens) - 1 :], strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [other.logprob for other in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_choices_of_one_prompt_equal_prompts_sent_apart(engine: TransformersEngine) -> None:
    assert run(texts(engine, PROMPTS[2], n=3)) == run(texts(engine, PROMPTS[2])) * 3


def test_a_seed_repeats_whatever_runs_beside_it(engine: TransformersEngine) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=40, seed=5)

    async def crowded() -> list[str]:
        others = [asyncio.create_task(texts(engine, prompt, str(i))) for i, prompt in enumerate(PROMPTS)]
        found = await texts(engine, PROMPTS[0], n=2, sampling=sampling)
        await asyncio.gather(*others)
        return found

    alone = run(texts(engine, PROMPTS[0], n=2, sampling=sampling))
    assert run(crowded()) == alone
    assert alone[0] != alone[1]


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(engine: TransformersEngine) -> None:
    whole = run(texts(engine, PROMPTS[0]))[0]
    stop = whole[7:13]
    found = run(deltas(engine, PROMPTS[0], stop=(stop, "never"), logprobs=0))
    assert "".join(delta.text for delta in found) == whole[: whole.index(stop)]
    assert found[-1].finish == "stop"
    assert all(token.offset < whole.index(stop) for delta in found for token in delta.tokens)


def test_long_prompts_do_not_stop_running_streams(llama: TransformersEngine) -> None:
    """While a prompt of 200 tokens is computed in chunks of 7, a running stream gains a token every step."""

    async def work() -> list[str]:
        order: list[str] = []

        async def follow(id: str, tokens: list[int]) -> None:
            request = GenerateRequest(id, tokens, 50, sampling=GREEDY, logprobs=0)
            async for delta in llama.generate(request):
                order.extend(id for _ in range(delta.generated - order.count(id)))

        short = asyncio.create_task(follow("short", [5, 6]))
        while not order:
            await asyncio.sleep(0)
        await asyncio.gather(short, follow("long", [7] * 200))
        return order

    order = run(work())
    assert order[: order.index("long")].count("short") >= 200 // 7


def test_an_end_token_ends_the_text_and_is_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are equal: the first token of the vocabulary is always drawn
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), SMALL)
    [delta] = run(deltas(engine, "x", logprobs=1))
    assert (delta.text, delta.generated, delta.finish) == ("", 1, "stop")
    assert [(token.id, token.end) for token in delta.tokens] == [(0, True)]
    engine.close()


def test_leaving_frees_the_place(llama: TransformersEngine) -> None:
    async def leave() -> None:
        stream = llama.generate(GenerateRequest("gone", [1, 2], 200, n=4, sampling=GREEDY))
        await anext(stream)
        assert llama.stats().running == 4
        await stream.aclose()  # type: ignore[attr-defined]
        waited = time.monotonic()
        while llama.stats().running and time.monotonic() - waited < 5:
            await asyncio.sleep(0.001)
        assert llama.stats().running == 0

    run(leave())


def test_a_full_queue_refuses_and_empties_again(llama: TransformersEngine) -> None:
    async def flood() -> None:
        streams = [llama.generate(GenerateRequest(str(i), [1], 100, sampling=GREEDY)) for i in range(12)]
        with pytest.raises(QueueFull, match="try again later"):
            llama.generate(GenerateRequest("over", [1], 1))
        for at in range(len(streams)):
            llama.abort(str(at))
        assert await texts(llama, PROMPTS[0])

    run(flood())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": []}, "prompt"),
        ({"tokens": [1] * 257}, "prompt"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"tokens": [10**6]}, "prompt"),
        ({"n": 5}, "n"),
    ],
)
def test_what_can_never_be_served_is_refused(llama: TransformersEngine, change: dict[str, Any], field: str) -> None:
    async def ask() -> None:
        llama.generate(GenerateRequest(**{"id": "bad", "tokens": [1], "max_tokens": 1, **change}))

    with pytest.raises(InvalidRequest) as refused:
        run(ask())
    assert refused.value.field == field


def test_the_whole_context_can_be_used(llama: TransformersEngine) -> None:
    found = run(deltas(llama, [5] * 200, max_tokens=56))
    assert found[-1].generated <= 56
    assert llama.context == 256


def test_a_failing_engine_fails_its_requests_and_its_check(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(str(tiny_model_dir), SMALL)
    engine.check()

    async def ask() -> None:
        stream = engine.generate(GenerateRequest("r", [1], 200, sampling=GREEDY))
        await anext(stream)
        engine._batch.tokens_out = None  # type: ignore[assignment]
        async for _ in stream:
            pass

    with pytest.raises(ServeError, match="the engine has failed"):
        run(ask())
    with pytest.raises(ServeError, match="the engine has failed"):
        engine.check()


def test_closing_fails_what_is_in_flight(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(str(tiny_model_dir), SMALL)

    async def ask() -> None:
        stream = engine.generate(GenerateRequest("r", [1], 200, sampling=GREEDY))
        await anext(stream)
        engine.close()
        async for _ in stream:
            pass

    with pytest.raises(ServeError, match="closed"):
        run(ask())


def test_a_sliding_window_bounds_the_context(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    shape = {**POSITIONS, "vocab_size": len(tokenizer), "sliding_window": 64}
    MistralForCausalLM(MistralConfig(**shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), SMALL)
    assert engine.context == 64
    engine.close()


def test_a_context_over_the_models_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ServeError, match=r"engine\.max_context 512 is over the model's 256 positions"):
        TransformersEngine(str(tiny_model_dir), EngineConfig(max_context=512))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot load a causal language model"):
        TransformersEngine(str(tmp_path), SMALL)
