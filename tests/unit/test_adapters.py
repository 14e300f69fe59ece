"""LoRA adapters in the default engine, against PEFT; side by side in one batch; and those that are refused."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from raymodels.config import EngineConfig
from raymodels.errors import AdapterError
from raymodels.serve.adapters import CONFIG, WEIGHTS, check_adapter, highest_rank
from raymodels.serve.engine import GenerateRequest, Grammar, InvalidRequest, Sampling
from raymodels.serve.engines import open_engine
from raymodels.serve.kv_cache import KVCache
from raymodels.serve.prefix import BLOCK, PrefixCache
from raymodels.serve.transformers_engine import TransformersEngine
from tests.lora_adapters import adapted, adapted_scores, random_adapter
from tests.random_models import random_model
from tests.unit.engines import deltas, reference, reference_scores, run, texts

pytestmark = pytest.mark.slow

NEEDS_VLLM = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")

PROMPT = "the model reads a line and learns what follows " * 3
PROMPTS = ["the model reads", "naïve café größer " * 6, "x", PROMPT]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "small": {"target_modules": ["q_proj", "v_proj"]},
        "large": {
            "target_modules": ALL,
            "use_rslora": True,
            "lora_alpha": 6,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7},
            "alpha_pattern": {r"model.layers.\d.mlp.*": 3, "lm_head": 2},
        },
    },
    "gpt2": {
        "small": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "large": {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "r": 8, "lora_alpha": 6},
    },
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(kind: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, shape = AutoTokenizer.from_pretrained(tiny_model_dir), {"initializer_range": 0.15}
    if kind == "gpt2":
        shape["num_key_value_heads"] = 4
    return random_model(tmp_path_factory.mktemp(kind), tokenizer, kind, **shape)


@pytest.fixture(scope="module")
def folders(kind: str, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp(f"{kind}-adapters")
    return {name: str(random_adapter(place / name, model_dir, **given)) for name, given in KINDS[kind].items()}


@pytest.fixture(scope="module")
def engine(model_dir: Path, folders: dict[str, str]) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(model_dir), EngineConfig(max_batch=8, prefill_chunk=7), adapters=folders)
    yield engine
    engine.close()


def peft_text(model_dir: Path, folder: str, tokens: list[int], new: int = 24) -> list[int]:
    ids = torch.tensor([tokens])
    model = adapted(model_dir, Path(folder))
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    found: list[int] = out[0, len(tokens) :].tolist()
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_scores_are_those_of_peft(
    engine: TransformersEngine, model_dir: Path, folders: dict[str, str], merged: bool
) -> None:
    tokens = engine.text.encode(PROMPT)
    for name, folder in folders.items():
        expected = adapted_scores(model_dir, Path(folder), tokens, merged)
        assert run(engine.score(tokens, name)) == pytest.approx(expected, abs=1e-5)
    base = reference_scores(model_dir, tokens)[range(len(tokens) - 1), tokens[1:]].tolist()
    assert run(engine.score(tokens)) == pytest.approx(base, abs=1e-5)


def test_greedy_tokens_are_those_of_peft(engine: TransformersEngine, model_dir: Path, folders: dict[str, str]) -> None:
    for name, folder in folders.items():
        for prompt in PROMPTS:
            tokens = engine.text.encode(prompt)
            found = run(deltas(engine, tokens, adapter=name, logprobs=0))
            assert [token.id for delta in found for token in delta.tokens] == peft_text(model_dir, folder, tokens)


def test_base_and_adapters_share_a_batch_and_each_answers_as_alone(engine: TransformersEngine) -> None:
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, "small", "large")]

    async def together() -> list[list[str]]:
        work = (texts(engine, prompt, str(at), adapter=name) for at, (prompt, name) in enumerate(asked))
        return list(await asyncio.gather(*work))

    alone = [run(texts(engine, prompt, adapter=name)) for prompt, name in asked]
    for at in range(0, len(asked), 3):
        assert len({*map(str, alone[at : at + 3])}) == 3
    for _ in range(3):
        assert run(together()) == alone


def test_prefixes_are_kept_apart(engine: TransformersEngine, model_dir: Path) -> None:
    tokens = engine.text.encode(PROMPT)
    assert len(tokens) > 2 * BLOCK
    for adapter in (None, "small", "large"):
        first, hits = run(texts(engine, PROMPT, adapter=adapter)), engine.stats().prefix_hits
        assert run(texts(engine, PROMPT, adapter=adapter)) == first
        assert engine.stats().prefix_hits > hits
    assert run(texts(engine, PROMPT)) == [reference(model_dir, PROMPT)]


def test_a_known_beginning_is_not_found_under_another_adapter() -> None:
    cache = KVCache((1, 1, 4), torch.float32, torch.device("cpu"), 1e6)
    prefixes, row = PrefixCache(cache, 10 * BLOCK), cache.row(BLOCK + 1)
    assert row
    tokens = list(range(BLOCK))
    cache.write_back(row, torch.ones(1, 2, 1, BLOCK, 4))
    prefixes.keep(tokens, row, "a")
    assert prefixes.restore([*tokens, 1], row, "b") == prefixes.restore([*tokens, 1], row) == 0
    assert prefixes.restore([*tokens, 1], row, "a") == BLOCK


def test_choices_of_one_request_share_its_adapter(engine: TransformersEngine) -> None:
    [alone] = run(texts(engine, PROMPTS[1], adapter="large"))
    assert run(texts(engine, PROMPTS[1], n=3, adapter="large")) == [alone] * 3
    drawn = Sampling(temperature=1, seed=7)
    assert len({*run(texts(engine, "x", n=3, adapter="large", sampling=drawn))}) > 1


def test_embeddings_are_those_of_the_adapted_model(
    engine: TransformersEngine, model_dir: Path, folders: dict[str, str]
) -> None:
    tokens = engine.text.encode(PROMPTS[1])

    async def together() -> list[list[float]]:
        return list(await asyncio.gather(*(engine.embed(tokens, name) for name in (None, *folders))))

    base, *found = run(together())
    for folder, vector in zip(folders.values(), found, strict=True):
        with torch.inference_mode():
            model = adapted(model_dir, Path(folder))
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert vector == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)
        assert vector != pytest.approx(base, abs=1e-3)


def test_a_grammar_binds_an_adapter_too(engine: TransformersEngine) -> None:
    grammar = Grammar("lark", 'start: "yes" | "no"')
    assert run(texts(engine, "x", adapter="small", grammar=grammar))[0] in ("yes", "no")


def test_an_unknown_adapter_is_refused(engine: TransformersEngine) -> None:
    async def ask() -> None:
        engine.generate(GenerateRequest("r", [1], 1, adapter="nowhere"))

    with pytest.raises(InvalidRequest, match="no adapter 'nowhere'") as refused:
        run(ask())
    assert (refused.value.field, refused.value.code) == ("model", "model_not_found")


def test_int8_weights_beside_an_adapter(model_dir: Path, folders: dict[str, str]) -> None:
    config = EngineConfig(max_batch=8, quantization="int8")
    engine = TransformersEngine(str(model_dir), config, adapters=folders)
    tokens = engine.text.encode("the model reads a line and learns")
    for name, folder in folders.items():
        exact = adapted_scores(model_dir, Path(folder), tokens)
        near = run(engine.score(tokens, name))
        assert near != exact
        errors = [abs(a - b) for a, b in zip(near, exact, strict=True)]
        other = [abs(a - b) for a, b in zip(run(engine.score(tokens)), exact, strict=True)]
        assert sum(errors) < sum(other) / 5
    engine.close()


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Path:
    return tiny_model_dir


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return random_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])


def refused(folder: Path, base: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"^adapter mine: .*{message}"):
        check_adapter("mine", str(folder), str(base))


def test_a_good_adapter_passes(folder: Path, base: Path) -> None:
    check_adapter("mine", str(folder), str(base))
    assert highest_rank("mine", str(folder)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"on": True}}, "something_new"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "r 0"),
        ({"r": "4"}, 'r "4"'),
        ({"r": True}, "r true"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 3"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"r": 8}, r"lora_A has shape \(4, 128\), and rank 8"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(
    folder: Path, base: Path, changes: dict[str, Any], message: str
) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))
    refused(folder, base, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers.0.self_attn.q_proj.lora_A", "layers.9.self_attn.q_proj.lora_A", "layers.9.*matches nothing"),
        ("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_magnitude", "is not a LoRA weight"),
        ("model.layers.0.self_attn.q_proj", "model.embed_tokens", "Embedding: only linear layers"),
        ("layers.0.self_attn.q_proj.lora_A", None, "lora_B alone"),
        ("layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj", "gate_proj: lora_B has shape"),
        ("", None, "is empty"),
    ],
)
def test_weights_that_are_not_for_the_base_are_refused(
    folder: Path, base: Path, old: str, new: str | None, message: str
) -> None:
    kept = {
        key if old not in key or new is None else key.replace(old, new): weight
        for key, weight in load_file(folder / WEIGHTS).items()
        if new is not None or old not in key
    }
    save_file(kept, folder / WEIGHTS)
    refused(folder, base, message)


def test_a_folder_without_a_readable_adapter_is_refused(folder: Path, base: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", base, "not in PEFT's format")
    (folder / WEIGHTS).write_bytes(b"torn")
    refused(folder, base, "cannot be read")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, base, "has no adapter_model.safetensors")
    (folder / CONFIG).write_text("{")
    refused(folder, base, "not in PEFT's format")


def test_an_adapter_of_another_base_is_refused_by_the_engine(folder: Path, base: Path, tmp_path: Path) -> None:
    narrow = random_model(tmp_path / "narrow", AutoTokenizer.from_pretrained(base), hidden_size=32)
    with pytest.raises(AdapterError, match=r"lora_B has shape \(64, 4\), .* needs \(32, 4\)"):
        TransformersEngine(str(narrow), EngineConfig(), adapters={"mine": str(folder)})


@NEEDS_VLLM
def test_vllm_computes_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    heads = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # of a size that it has kernels for
    model_dir = random_model(tmp_path / "model", tokenizer, initializer_range=0.15, **heads)
    body = {"target_modules": ALL[:-1], "alpha_pattern": {r"model.layers.\d.mlp.*": 3}}  # vLLM adapts no lm_head
    settings = {name: given | body for name, given in KINDS["llama"].items()}
    folders = {name: random_adapter(tmp_path / name, model_dir, **given) for name, given in settings.items()}
    config = EngineConfig(kind="vllm", max_batch=8, max_context=256)
    engine = open_engine(str(model_dir), config, 1, {name: str(folder) for name, folder in folders.items()})
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, *folders)]

    async def together() -> list[list[str]]:
        work = (texts(engine, prompt, str(at), adapter=name) for at, (prompt, name) in enumerate(asked))
        return list(await asyncio.gather(*work))

    try:
        tokens = tokenizer(PROMPT)["input_ids"]
        for name, folder in folders.items():
            assert run(engine.score(tokens, name)) == pytest.approx(adapted_scores(model_dir, folder, tokens), abs=1e-4)
        alone = [run(texts(engine, prompt, adapter=name)) for prompt, name in asked]
        assert alone[::3] == [[reference(model_dir, prompt)] for prompt in PROMPTS]
        for (prompt, name), [found] in zip(asked, alone, strict=True):
            if name is not None:
                ids = peft_text(model_dir, str(folders[name]), tokenizer(prompt)["input_ids"])
                assert found == tokenizer.decode(ids, skip_special_tokens=True)
        assert run(together()) == alone
        with pytest.raises(InvalidRequest, match="no adapter 'nowhere'"):
            run(texts(engine, "x", adapter="nowhere"))
    finally:
        engine.close()
