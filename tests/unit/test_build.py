"""Models of the shape asked for, and weights that depend on the seed alone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, T5Config

from raymodels.config import ModelConfig
from raymodels.errors import ConfigError
from raymodels.models.build import architecture, construct, flops_per_token, initialize, load, parameter_count

pytestmark = pytest.mark.slow

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2"]
SHAPE: dict[str, Any] = {"hidden_size": 32, "layers": 3, "heads": 4}
VOCAB, SEQ_LEN = 96, 16
# Each shape setting: a value beside the defaults, and where transformers keeps it, for Llama-likes and for GPT-2.
EFFECTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any] | None]] = {
    "hidden_size": (64, {"hidden_size": 64, "head_dim": 16}, {"n_embd": 64}),
    "layers": (2, {"num_hidden_layers": 2}, {"n_layer": 2}),
    "heads": (2, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, {"n_head": 2}),
    "kv_heads": (1, {"num_key_value_heads": 1}, None),
    "intermediate_size": (40, {"intermediate_size": 40}, {"n_inner": 40}),
    "max_positions": (99, {"max_position_embeddings": 99}, {"n_positions": 99}),
    "rope_theta": (5e5, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    "tie_embeddings": (False, {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    "dropout": (0.25, {"attention_dropout": 0.25}, {"resid_pdrop": 0.25, "embd_pdrop": 0.25, "attn_pdrop": 0.25}),
}


def shape(arch: str, **changes: Any) -> Any:
    config = ModelConfig(arch=arch, **SHAPE | changes)  # type: ignore[arg-type]
    return architecture(config, vocab_size=VOCAB, seq_len=SEQ_LEN, eos_id=5)


def built(arch: str, seed: int = 1, **changes: Any) -> PreTrainedModel:
    model = construct(shape(arch, **changes), torch.float32)
    initialize(model, seed, lambda parameters: nullcontext())
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(SEQ_LEN)[None]).logits.detach()


def test_every_setting_is_looked_at() -> None:
    assert set(EFFECTS) == set(ModelConfig.model_fields) - {"from_", "arch"}


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_setting_has_an_effect(arch: str, name: str) -> None:
    value, llama, gpt2 = EFFECTS[name]
    expected = gpt2 if arch == "gpt2" else llama
    if expected is None:
        with pytest.raises(ValueError, match=f"arch gpt2 .*remove {name}"):
            shape(arch, **{name: value})
        return
    found = shape(arch, **{name: value})
    assert found.model_type == arch
    assert {key: getattr(found, key) for key in expected} == expected
    assert {key: getattr(shape(arch), key) for key in expected} != expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_has_the_shape_and_runs(arch: str) -> None:
    model = built(arch)
    assert logits(model).shape == (1, SEQ_LEN, VOCAB)
    assert model.config.max_position_embeddings == SEQ_LEN and not model.config.use_cache
    assert {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id} == {5}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dropout_acts_in_training_only(arch: str) -> None:
    model = built(arch, dropout=0.5)
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    assert torch.equal(logits(built(arch).train()), logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_embeddings_are_tied_as_asked(arch: str, tied: bool) -> None:
    model = built(arch, tie_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameter_count_is_that_of_the_model(arch: str, tied: bool) -> None:
    model = built(arch, tie_embeddings=tied)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_depend_on_the_seed_alone(arch: str) -> None:
    torch.manual_seed(123)
    first = built(arch).state_dict()
    torch.manual_seed(456)
    torch.rand(99)
    again, other = built(arch).state_dict(), built(arch, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "gpt2"])  # it scales by their number
def test_a_layers_weights_do_not_depend_on_how_many_follow(arch: str) -> None:
    long, short = built(arch).state_dict(), built(arch, layers=2).state_dict()
    assert all(torch.equal(short[name], long[name]) for name in short)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_spread_as_the_architecture_prescribes(arch: str) -> None:
    model = built(arch, hidden_size=128)
    spread = model.config.initializer_range
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.all(weight == ("norm" in name or ".ln_" in name) * name.endswith("weight")), name
            continue
        expected = spread / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else spread
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_two_matrices_are_alike(arch: str) -> None:
    matrices = [weight.flatten()[:32] for weight in built(arch).parameters() if weight.ndim > 1]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


def test_flops_of_a_token_are_six_per_weight_and_attention() -> None:
    tied, untied = shape("llama"), shape("llama", tie_embeddings=False)
    attention = 12 * 3 * 32 * SEQ_LEN
    assert flops_per_token(tied, parameter_count(tied), SEQ_LEN) == 6 * parameter_count(tied) + attention
    # A table that is only looked up multiplies nothing; tied, the same weights are the output's matrix.
    assert flops_per_token(untied, parameter_count(untied), SEQ_LEN) == flops_per_token(
        tied, parameter_count(tied), SEQ_LEN
    )


# Starting from a model


def starting_from(place: Path | str, vocab_size: int = VOCAB, seq_len: int = SEQ_LEN) -> Any:
    model = ModelConfig.model_validate({"from": str(place)})
    return architecture(model, vocab_size=vocab_size, seq_len=seq_len, eos_id=0)


def test_a_model_directory_is_loaded_with_its_weights(tiny_model_dir: Path) -> None:
    vocab_size = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    config = starting_from(tiny_model_dir, vocab_size, seq_len=256)
    model = load(str(tiny_model_dir), config, torch.float32)
    assert config.hidden_size == 64 and not model.config.use_cache
    again = load(str(tiny_model_dir), config, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load(str(tiny_model_dir), config, torch.bfloat16).dtype == torch.bfloat16


def test_too_small_a_vocabulary_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"has \d+ embeddings, the tokenizer 999999 tokens: .*remove data\.tokenizer"):
        starting_from(tiny_model_dir, vocab_size=999_999)


def test_too_long_samples_are_named(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.seq_len 257 is over the 256 positions of model\.from"):
        starting_from(tiny_model_dir, seq_len=257)


def test_a_place_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model.from {tmp_path}: "):
        starting_from(tmp_path)


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model.from {tmp_path} is a t5, not a causal language model"):
        starting_from(tmp_path)
