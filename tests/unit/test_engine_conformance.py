"""What every engine promises, asked of each: the default one always, vLLM where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raymodels.config import EngineConfig
from raymodels.serve.engine import Engine, GenerateRequest, Grammar, InvalidRequest, QueueFull, Sampling
from raymodels.serve.engines import open_engine
from tests.random_models import random_model
from tests.unit.engines import GREEDY, all_texts, deltas, reference, reference_scores, run, texts

pytestmark = pytest.mark.slow

NEEDS_VLLM = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
KINDS = ["transformers", pytest.param("vllm", marks=NEEDS_VLLM)]
PROMPTS = ["the model reads", "模型", "naïve café größer " * 6, "x", "a line and learns what follows the model"]
SETTINGS = {"max_batch": 8, "max_queue": 8, "max_context": 256, "prefill_chunk": 7}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of a size that vLLM has kernels for."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return random_model(tmp_path_factory.mktemp("model"), tokenizer, **shape)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Engine]:
    engine = open_engine(str(model_dir), EngineConfig(kind=request.param, **SETTINGS), threads=1)
    yield engine
    engine.close()


def test_greedy_text_is_that_of_generate_alone_and_together(engine: Engine, model_dir: Path) -> None:
    expected = [reference(model_dir, prompt) for prompt in PROMPTS]
    assert [run(texts(engine, prompt))[0] for prompt in PROMPTS] == expected
    assert run(all_texts(engine, PROMPTS * 2)) == expected * 2
    assert run(texts(engine, PROMPTS[2], n=3)) == [expected[2]] * 3


def test_scores_are_log_probabilities_of_the_prompt(engine: Engine, model_dir: Path) -> None:
    tokens = engine.text.encode(PROMPTS[2])
    found = run(engine.score(tokens))
    rows = reference_scores(model_dir, tokens)
    assert found == pytest.approx(rows[range(len(tokens) - 1), tokens[1:]].tolist(), abs=1e-3)
    [delta] = run(deltas(engine, tokens, max_tokens=0, prompt_logprobs=2))
    assert [token.id for token in delta.prompt] == tokens
    assert [token.logprob for token in delta.prompt[1:]] == pytest.approx(found, abs=1e-4)
    assert all(token.top[0].logprob >= token.top[1].logprob for token in delta.prompt[1:])
    assert (delta.text, delta.generated, delta.finish) == ("", 0, "length")


def test_new_tokens_come_with_their_log_probabilities(engine: Engine, model_dir: Path) -> None:
    found = run(deltas(engine, PROMPTS[0], logprobs=3, max_tokens=8))
    tokens = [token for delta in found for token in delta.tokens]
    assert len(tokens) == found[-1].generated
    ids = [*engine.text.encode(PROMPTS[0]), *(token.id for token in tokens)]
    rows = reference_scores(model_dir, ids)[-len(tokens) - 1 : -1]
    for token, row in zip(tokens, rows, strict=True):
        assert (token.top[0].id, token.top[0].logprob) == (token.id, token.logprob)
        assert [other.logprob for other in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_choices_are_independent_and_a_seed_repeats_them(engine: Engine) -> None:
    drawn = Sampling(temperature=1, seed=7)
    first, second = (run(texts(engine, "x", id=str(n), n=4, sampling=drawn)) for n in range(2))
    assert first == second
    assert len({*first}) > 1


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(engine: Engine, model_dir: Path) -> None:
    whole = reference(model_dir, PROMPTS[0])
    stop = whole[7:13]
    assert len(engine.text.encode(stop)) > 1
    found = run(deltas(engine, PROMPTS[0], stop=(stop, "never"), logprobs=0))
    assert "".join(delta.text for delta in found) == whole[: whole.index(stop)]
    assert found[-1].finish == "stop"
    assert all(token.offset < whole.index(stop) for delta in found for token in delta.tokens)


def test_penalties_and_biases(engine: Engine) -> None:
    biased = run(deltas(engine, "x", logprobs=0, sampling=Sampling(temperature=0, logit_bias=((7, 100.0),))))
    assert {token.id for delta in biased for token in delta.tokens} == {7}
    penalised = Sampling(temperature=0, presence_penalty=2, frequency_penalty=2)
    varied = [token.id for delta in run(deltas(engine, "x", logprobs=0, sampling=penalised)) for token in delta.tokens]
    assert len({*varied}) > len(varied) / 2


def test_a_json_schema_is_followed(engine: Engine) -> None:
    schema = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"]}
    grammar = Grammar("json_schema", json.dumps({**schema, "additionalProperties": False}))
    [text] = run(texts(engine, "x", max_tokens=60, grammar=grammar))
    assert json.loads(text)["size"] in ("small", "large")
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        run(texts(engine, "x", grammar=Grammar("json_schema", "{")))


def test_leaving_frees_the_place(engine: Engine) -> None:
    async def leave() -> None:
        stream = engine.generate(GenerateRequest("gone", [5, 6], 200, n=4, sampling=GREEDY))
        await anext(stream)
        assert engine.stats().running + engine.stats().queued == 4
        await stream.aclose()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 10
        while engine.stats().running + engine.stats().queued:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)

    run(leave())


def test_a_full_queue_refuses(engine: Engine) -> None:
    async def fill() -> list[Any]:
        asked = (texts(engine, "x", str(n), n=4, max_tokens=40) for n in range(6))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    found = run(fill())
    refused = [each for each in found if isinstance(each, QueueFull)]
    assert len(refused) == 2 and "try again later" in str(refused[0])
    answered = [each for each in found if not isinstance(each, BaseException)]
    assert answered == [run(texts(engine, "x", n=4, max_tokens=40))] * 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": []}, "prompt"),
        ({"tokens": [1] * 257}, "prompt"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"tokens": [10**6]}, "prompt"),
        ({"n": 9}, "n"),
    ],
)
def test_what_can_never_be_served_is_refused(engine: Engine, change: dict[str, Any], field: str) -> None:
    async def ask() -> None:
        engine.generate(GenerateRequest(**{"id": "bad", "tokens": [1], "max_tokens": 1, **change}))

    with pytest.raises(InvalidRequest) as refused:
        run(ask())
    assert refused.value.field == field
