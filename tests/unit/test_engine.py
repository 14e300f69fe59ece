"""What only the default engine does, and how it computes architectures other than the conformance suite's Llama."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.engine import GenerateRequest, RequestFailed, Sampling
from raymodels.serve.transformers_engine import TransformersEngine
from tests.random_models import random_model
from tests.unit.engines import GREEDY, all_texts, deltas, reference, reference_scores, run, texts

pytestmark = pytest.mark.slow

PROMPTS = ["the model reads", "模型", "naïve café größer " * 6, "x", "a line and learns what follows the model"]
SMALL = EngineConfig(max_batch=4, max_queue=8, prefill_chunk=7)
ARCHITECTURES: dict[str, dict[str, int]] = {"qwen2": {}, "qwen3": {"head_dim": 16}, "gpt2": {"num_key_value_heads": 4}}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model_dir(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return random_model(
        tmp_path_factory.mktemp(request.param), tokenizer, request.param, **ARCHITECTURES[request.param]
    )


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
    expected = reference_scores(model_dir, tokens)[range(len(tokens) - 1), tokens[1:]]
    assert run(engine.score(tokens)) == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_seed_repeats_whatever_runs_beside_it(llama: TransformersEngine) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=40, seed=5)

    async def crowded() -> list[str]:
        others = [asyncio.create_task(texts(llama, prompt, str(i))) for i, prompt in enumerate(PROMPTS)]
        found = await texts(llama, PROMPTS[0], n=2, sampling=sampling)
        await asyncio.gather(*others)
        return found

    alone = run(texts(llama, PROMPTS[0], n=2, sampling=sampling))
    assert run(crowded()) == alone
    assert alone[0] != alone[1]


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


def test_the_whole_context_can_be_used(llama: TransformersEngine) -> None:
    unending = Sampling(temperature=0, logit_bias=((0, -100.0),))  # 0 is the end-of-text token
    found = run(deltas(llama, [5] * 200, max_tokens=56, sampling=unending))
    assert (found[-1].generated, found[-1].finish) == (56, "length")
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

    with pytest.raises(RequestFailed):
        run(ask())
    engine._thread.join(10)  # it tries a token of its own, which fails too
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
    with pytest.raises(ServeError, match="closed"):
        engine.check()


def test_a_sliding_window_bounds_the_context(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    engine = TransformersEngine(str(random_model(tmp_path, tokenizer, "mistral", sliding_window=64)), SMALL)
    assert engine.context == 64
    engine.close()


def test_a_context_over_the_models_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ServeError, match=r"engine\.max_context 512 is over the model's 256 positions"):
        TransformersEngine(str(tiny_model_dir), EngineConfig(max_context=512))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot load a causal language model"):
        TransformersEngine(str(tmp_path), SMALL)
