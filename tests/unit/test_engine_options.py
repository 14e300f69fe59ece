"""What a request may ask of the sampling: penalties, biases, a grammar; and embeddings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from raymodels.config import EngineConfig
from raymodels.serve.engine import GenerateRequest, Grammar, InvalidRequest, Sampling
from raymodels.serve.sampling import Sampler
from raymodels.serve.transformers_engine import TransformersEngine
from raymodels.serve.weights import Int8Linear, PackedLinear
from tests.unit.engines import deltas, reference, run, texts

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(tiny_model_dir), EngineConfig(max_batch=8, prefill_chunk=7))
    yield engine
    engine.close()


def test_penalties_follow_openais_formula() -> None:
    logits = torch.tensor([3.0, 2.9, 2.05, 0.0])
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.4), 0)
    # 3.0 falls by 0.9 to 2.1, 2.9 to 2.0, 2.05 to 1.15; then 2.1 to 1.7 and so on.
    assert [sampler.draw(logits) for _ in range(6)] == [0, 1, 0, 2, 1, 0]


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids() -> None:
    logits = torch.tensor([3.0, 2.9, 2.0, 0.0])
    assert Sampler(Sampling(temperature=0, logit_bias=((3, 100),)), 0).draw(logits) == 3
    banned = Sampler(Sampling(temperature=1, seed=1, logit_bias=((0, -100), (1, -100))), 0)
    assert {banned.draw(logits) for _ in range(50)} == {2, 3}


@pytest.mark.slow
def test_penalties_and_biases_change_only_their_own_request(engine: TransformersEngine, tiny_model_dir: Path) -> None:
    prompt = "the model reads"
    bias = Sampling(temperature=0, logit_bias=((7, 100.0),))
    never = Sampling(temperature=0, presence_penalty=2, frequency_penalty=2)

    async def together() -> Any:
        return await asyncio.gather(
            texts(engine, prompt, "plain"),
            deltas(engine, prompt, "bias", sampling=bias, logprobs=0),
            deltas(engine, prompt, "never", sampling=never, logprobs=0),
        )

    [plain], biased, varied = run(together())
    assert plain == reference(tiny_model_dir, prompt)
    assert {token.id for delta in biased for token in delta.tokens} == {7}
    ids = [token.id for delta in varied for token in delta.tokens]
    assert len({*ids}) > len(ids) / 2


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_json_schema_is_followed_to_its_end(engine: TransformersEngine, temperature: float) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    sampling = Sampling(temperature=temperature, seed=3)
    found = run(deltas(engine, "x", n=4, max_tokens=250, grammar=grammar, sampling=sampling))
    finishes = {delta.choice: delta.finish for delta in found if delta.finish}
    assert finishes == dict.fromkeys(range(4), "stop")
    for choice in range(4):
        text = "".join(delta.text for delta in found if delta.choice == choice)
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.slow
def test_a_lark_grammar_is_followed(engine: TransformersEngine) -> None:
    grammar = Grammar("lark", 'start: "yes" | "no"')
    assert run(texts(engine, "the model", grammar=grammar))[0] in ("yes", "no")


@pytest.mark.slow
def test_a_grammar_is_compiled_once_for_all_choices_and_requests(engine: TransformersEngine) -> None:
    grammar = Grammar("lark", 'start: "red" | "green" | "blue"')
    compiled = run(engine.compile(grammar))
    for seed in range(3):
        drawn = Sampling(temperature=1, seed=seed)
        assert {*run(texts(engine, "x", n=4, grammar=grammar, sampling=drawn))} <= {"red", "green", "blue"}
    assert run(engine.compile(grammar)) is run(engine.compile(compiled)) is compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "strin"}'),
        Grammar("json_schema", '{"$ref": "#/nowhere"}'),
        Grammar("lark", "start: missing"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(engine: TransformersEngine, grammar: Grammar) -> None:
    async def ask() -> None:
        engine.generate(GenerateRequest("bad", [1], 5, grammar=grammar))

    with pytest.raises(InvalidRequest, match="cannot be compiled") as refused:
        run(ask())
    assert refused.value.field == "grammar"


@pytest.mark.slow
def test_an_embedding_is_the_mean_of_the_last_hidden_states(engine: TransformersEngine, tiny_model_dir: Path) -> None:
    prompts = ["the model reads a line and learns what follows", "café", "größer naïve"]

    async def together() -> Any:
        beside = texts(engine, "the model", "beside", max_tokens=60)
        return await asyncio.gather(*(engine.embed(engine.text.encode(p)) for p in prompts), beside)

    *found, [text] = run(together())
    assert text == reference(tiny_model_dir, "the model", 60)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.inference_mode():
            hidden = model.model(torch.tensor([engine.text.encode(prompt)])).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)


@pytest.mark.slow
def test_int8_weights_answer_nearly_as_full_ones(engine: TransformersEngine, tiny_model_dir: Path) -> None:
    tokens = engine.text.encode("the model reads a line and learns what follows")
    quantized = TransformersEngine(str(tiny_model_dir), EngineConfig(max_batch=8, quantization="int8"))
    exact, near = run(engine.score(tokens)), run(quantized.score(tokens))
    quantized.close()
    assert near != exact
    assert near == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (1, 40, 48)])
def test_linear_layers_compute_what_they_replace(kind: Any, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    linear = torch.nn.Linear(48, 96, bias=bias)
    rows = torch.randn(shape)
    with torch.inference_mode():
        found, expected = kind(linear)(rows), linear(rows)
    assert found.shape == expected.shape
    tolerance = 1e-5 if kind is PackedLinear else 0.03  # half a step of 127, and bfloat16's 8 bits
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
