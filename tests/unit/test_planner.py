"""The plan of a run, against what torch does here and what others have published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks

from raymodels.config import Config, ModelConfig, ZeroConfig, load, validate
from raymodels.errors import ConfigError
from raymodels.models.build import DTYPES, architecture, construct
from raymodels.tasks import task
from raymodels.train.planner import plan, preflight, relief
from raymodels.train.planner import trace as tracing
from raymodels.train.planner.memory import Setting, Weights, communication, deepspeed_estimate, memory
from raymodels.train.planner.options import OFFLOADS
from raymodels.train.planner.trace import Moment, Pass, trace

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "jobs/configs"
ARCHS = ["llama", "gpt2", "qwen2", "qwen3"]
NOTHING = Pass(0, 0, (Moment("forward", 0, 0),))


def shape(arch: Any, layers: int = 2, **model: Any) -> Any:
    settings = ModelConfig(arch=arch, hidden_size=64, layers=layers, heads=4, **model)
    return architecture(settings, vocab_size=256, seq_len=48, eos_id=0)


def one_pass(config: Any, *, checkpointing: bool = False, masked: bool = False, precision: str = "fp32") -> Pass:
    return trace(
        config,
        kind="causal_lm",
        batch=3,
        tokens=48,
        precision=precision,
        checkpointing=checkpointing,
        masked=masked,
    )


def small(**sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "data": {"source": "texts", "seq_len": 128},
        "model": {"hidden_size": 256, "layers": 4, "heads": 4},
        "train": {"steps": 10, "global_batch": 64, "micro_batch": 16, "lr": 1e-3, "precision": "bf16"},
        "zero": {"stage": 1, "reduce_bucket_size": 1_000_000},
        "workers": {"count": 2, "gpus": 1},
    }
    return validate({key: {**base.get(key, {}), **sections.get(key, {})} for key in base.keys() | sections.keys()})


def setting(stage: int, workers: int = 8, offloaded: int = 0, accumulation: int = 1, **zero: Any) -> Setting:
    return Setting(stage, offloaded > 0, offloaded > 1, workers, accumulation, True, ZeroConfig(stage=stage, **zero))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_activations_are_those_that_torch_keeps(arch: str, precision: str, masked: bool) -> None:
    config = shape(arch, dropout=0.1 if arch == "gpt2" else 0.0)
    model = construct(config, DTYPES[precision])
    model.tie_weights()
    ids = torch.zeros(3, 48, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0 if masked else 1
    kept: dict[int, torch.Tensor] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        task("causal_lm").loss(model, {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Beside what is saved: the loss, and the tables that the model returns to no one.
    assert one_pass(config, masked=masked, precision=precision).kept == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_two_layers_tell_what_seven_do(arch: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape(arch, layers=7)
    told = one_pass(config, checkpointing=checkpointing)
    monkeypatch.setattr(tracing, "LAYERS_RUN", (7, 8))
    tracing._trace.cache_clear()
    run = one_pass(config, checkpointing=checkpointing)
    tracing._trace.cache_clear()
    assert told.kept == run.kept
    assert told.moments[-1].gradients == run.moments[-1].gradients
    for gradients in (lambda made: 0, lambda made: made, lambda made: min(made, 50_000)):
        assert told.peak(gradients) == pytest.approx(run.peak(gradients), rel=0.01)


def test_activation_checkpointing_keeps_a_layers_input() -> None:
    short, longer = (one_pass(shape("llama", layers), checkpointing=True) for layers in (2, 3))
    assert longer.kept - short.kept == 3 * 48 * 64 * 4


def test_activations_of_a_layer_are_near_the_published_formula() -> None:
    """Korthikanti et al. (2022), section 4.1, in 16 bits: 34 s b h a layer, of which 2 are the masks of dropout, and
    5 a s^2 b for attention scores, which fused attention does not keep."""
    short, longer = shape("gpt2", 2), shape("gpt2", 3)
    short.activation_function = longer.activation_function = "gelu"  # in one kernel, as the paper counts it
    kept = one_pass(longer, precision="bf16").kept - one_pass(short, precision="bf16").kept
    assert kept == pytest.approx(32 * 48 * 3 * 64, rel=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_the_zero_papers(stage: int) -> None:
    weights = Weights((1_000_000, 600_000), itemsize=2)
    held = memory(weights, setting(stage, workers=4), NOTHING)
    p = weights.count
    assert held.parameters == 2 * p / (4 if stage == 3 else 1)
    assert held.gradients == 2 * p / (4 if stage >= 2 else 1)
    assert held.optimizer == 12 * p / (4 if stage >= 1 else 1)


def test_small_parameters_stay_whole_at_stage_3() -> None:
    weights = Weights((1_000_000, 500), itemsize=2)
    held = memory(weights, setting(3, param_persistence_threshold=500), NOTHING)
    assert held.parameters == 2 * (weights.count / 8 + 500)


def test_offloaded_states_move_to_the_host() -> None:
    weights = Weights((8_000_000,), itemsize=2)
    optimizer, both = (memory(weights, setting(3, offloaded=offloaded), NOTHING) for offloaded in (1, 2))
    assert (optimizer.parameters, optimizer.gradients, optimizer.optimizer) == (2_000_000, 0, 0)
    assert both.states == 0
    assert both.host - optimizer.host == 2_000_000
    assert optimizer.host == 18 * weights.count / 8


def test_the_peak_of_a_pass_counts_gradients_as_they_are_made() -> None:
    moments = (Moment("forward", 100, 0), Moment("upper", 120, 0), Moment("lower", 30, 200))
    assert Pass(100, 90, moments).peak(lambda made: 0) == 120
    assert Pass(100, 90, moments).peak(lambda made: made) == 230
    assert Pass(100, 90, moments).peak(lambda made: 0, forward=50) == 140


@pytest.mark.parametrize(
    ("stage", "offloaded", "documented"), [(2, 0, 15.93), (2, 1, 5.31), (3, 0, 6.10), (3, 1, 0.79), (3, 2, 0.12)]
)
def test_deepspeeds_documented_figures(stage: int, offloaded: int, documented: float) -> None:
    """t5-3b on 8 GPUs, in GB of 2^30, from DeepSpeed's "Memory Requirements"."""
    ours = deepspeed_estimate(Weights((2_851_000_000,), 2), 32_000_000, setting(stage, offloaded=offloaded))
    assert ours / 2**30 == pytest.approx(documented, rel=0.02)


def test_communication_is_the_zero_papers() -> None:
    """Section 7: 2 x the model at stages 0 to 2, 3 x at stage 3, for many workers and one micro batch a step."""
    weights = Weights((1_000_000,), itemsize=2)
    sent = [communication(weights, setting(stage, workers=1000)) / (2 * weights.count) for stage in range(4)]
    assert sent == pytest.approx([2, 3, 3, 3], rel=0.01)  # DeepSpeed all-reduces where the paper reduces and scatters
    assert communication(weights, setting(3, workers=1)) == 0


def test_the_70b_config_is_planned_without_its_weights() -> None:
    planned = plan(load(CONFIGS / "pretrain-70b.yaml"), 80e9)
    assert planned.parameters == 70_599_843_840
    assert planned.checkpoint == 12 * planned.parameters
    assert planned.chosen.fits
    assert planned.recommended
    assert planned.recommended.stage == 3
    assert {(option.stage, option.offload) for option in planned.options if option.fits} == {
        (3, offload) for offload in OFFLOADS
    }
    assert planned.activations > 10 * planned.activations_checkpointed


def test_the_recommendation_sends_least_of_what_fits() -> None:
    planned = plan(small(), 80e9)
    assert planned.recommended
    assert planned.recommended.name == "stage 0"
    short = next(option for option in planned.options if option.name == "stage 0").needed - 1
    planned = plan(small(), short)
    assert planned.recommended
    assert planned.recommended.communication == min(o.communication for o in planned.options if o.fits)
    assert "stage 0 needs" in planned.reason


def test_nothing_is_judged_without_a_device_memory() -> None:
    planned = plan(small())
    assert planned.recommended is None
    assert "workers.device_memory" in planned.reason
    planned.must_fit()


def test_the_cheapest_change_is_named_and_fits() -> None:
    config = small()
    planned = plan(config, plan(config).chosen.needed - 1)
    with pytest.raises(ConfigError, match=r"stage 1 on 2 workers needs .* GB .*: set train\.micro_batch 8$"):
        planned.must_fit()
    assert plan(small(train={"micro_batch": 8}), planned.device_memory).chosen.fits


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (small(train={"micro_batch": 1}, zero={"stage": 0}), "zero.stage 1"),
        (small(train={"micro_batch": 1}, zero={"stage": 3}, data={"seq_len": 2048}), "train.activation_checkpointing"),
    ],
)
def test_other_changes(config: Config, change: str) -> None:
    planned = plan(config, plan(config).chosen.needed - 1)
    assert planned.change
    assert change in planned.change


def test_more_workers_are_the_last_resort() -> None:
    config = small(
        train={"micro_batch": 1, "activation_checkpointing": True},
        zero={"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_params": {"device": "cpu"}},
        model={"hidden_size": 1024, "layers": 16},
    )
    planned = plan(config, plan(config).chosen.needed - 1)
    assert planned.change is None
    with pytest.raises(ConfigError, match="no number of workers helps"):
        planned.must_fit()
    half = small(train={"micro_batch": 1, "activation_checkpointing": True}, zero={"stage": 3}, workers={"gpus": 0})
    planned = plan(half, plan(half).chosen.needed - 1)
    assert planned.change == "workers.count 4"


def test_preflight_refuses_states_that_cannot_fit() -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(ConfigError, match=r"of memory a worker, there are 0\.01 GB"):
        preflight(small(workers={"device_memory": "10MB"}), events.append)
    assert events == []


def test_preflight_only_says_what_may_not_fit() -> None:
    needed = int(plan(small()).chosen.needed)
    events: list[dict[str, Any]] = []
    preflight(small(workers={"device_memory": needed - 1}), events.append)
    (event,) = events
    assert event["kind"] == "notice"
    assert "train.micro_batch 8" in event["text"]
    preflight(small(workers={"device_memory": needed + 1}), lambda event: pytest.fail(str(event)))


def test_relief_gives_the_estimate_and_settings_that_really_take_less() -> None:
    train = {"micro_batch": 128, "global_batch": 512}
    config = small(train=train)
    before = plan(config).chosen.needed
    advice = relief(config)
    assert f"{before / 1e9:,.2f} GB a worker" in advice and "25% less with " in advice
    changed = dict(part.split(" ") for part in advice.split(" less with ")[1].split(", "))
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in changed.items():
        section, _, key = setting.partition(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    assert plan(small(train={**train, **sections.pop("train", {})}, **sections)).chosen.needed <= 0.75 * before


def test_preflight_of_cpu_workers_knows_this_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    huge = load(CONFIGS / "pretrain-70b.yaml", ["workers.gpus=0", "zero.offload_optimizer.device=none"])
    with pytest.raises(ConfigError, match="GB of memory a worker"):
        preflight(huge)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    preflight(huge)  # another host's memory is not known


def test_device_memory_is_read_with_its_unit() -> None:
    assert small(workers={"device_memory": "80GB"}).workers.device_memory == 80_000_000_000
    assert small(workers={"device_memory": "80GiB"}).workers.device_memory == 80 * 2**30


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from raymodels import cli

    demo = str(CONFIGS / "demo.yaml")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["raymodels", "plan", demo, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        seen = capsys.readouterr()
        return int(end.value.code or 0), seen.out, seen.err

    code, out, _ = run("--device-memory", "16GB")
    assert code == 0
    assert "optimizer" in out
    assert "this config" in out
    code, out, _ = run("--json")
    assert code == 0
    assert json.loads(out)["checkpoint"] == 12 * json.loads(out)["parameters"]
    code, _, error = run("--device-memory", "500MB")
    assert code == 2
    assert error.startswith("error: stage 2 on 2 workers needs")
    code, _, error = run("--device-memory", "much")
    assert code == 2
    assert "workers.device_memory" in error
