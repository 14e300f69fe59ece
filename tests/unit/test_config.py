"""Configs: what is read, what is refused and in which words, what is written back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raymodels.config import (
    Config,
    ServeConfig,
    changed_settings,
    difference,
    dump,
    from_yaml,
    load,
    to_yaml,
    validate,
)
from raymodels.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "jobs/configs").glob("*.yaml"))
TRAINING = [path for path in CONFIGS if path.stem != "serve"]
SERVING = [path for path in CONFIGS if path.stem == "serve"]
PLAIN: dict[str, Any] = {
    "run": {"name": "test"},
    "data": {"source": "texts", "seq_len": 16},
    "model": {"hidden_size": 8, "layers": 1, "heads": 2},
    "train": {"steps": 10, "global_batch": 8, "micro_batch": 2, "lr": 1e-3},
    "workers": {"count": 2},
}
ENDPOINT: dict[str, Any] = {"models": [{"model": "lm@prod"}, {"model": "other"}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return path


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(ENDPOINT))
    return path


def changed(**sections: dict[str, Any]) -> Config:
    return validate({**PLAIN, **{name: {**PLAIN.get(name, {}), **keys} for name, keys in sections.items()}})


# The shipped files


def test_there_are_shipped_configs() -> None:
    assert len(TRAINING) >= 4 and len(SERVING) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_read_and_written_back(path: Path) -> None:
    root = ServeConfig if path in SERVING else Config
    config = load(path, root=root)
    assert validate(dump(config), root) == config
    assert validate(yaml.safe_load(to_yaml(config)), root) == config


# Writing back


@settings(max_examples=40)
@given(
    lr=st.floats(1e-12, 1e6),
    eps=st.floats(1e-300, 1.0),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    seed=st.integers(0, 2**31 - 1),
    micro_batch=st.integers(1, 2**20),
    accumulation=st.integers(1, 64),
    count=st.integers(1, 4096),
    samples=st.none() | st.integers(1, 2**40),
)
def test_any_numbers_survive_yaml(
    lr: float,
    eps: float,
    betas: tuple[float, float],
    seed: int,
    micro_batch: int,
    accumulation: int,
    count: int,
    samples: int | None,
) -> None:
    batches = {"micro_batch": micro_batch, "global_batch": micro_batch * accumulation * count}
    config = changed(
        run={"seed": seed},
        train={"lr": lr, "eps": eps, "betas": betas, **batches},
        workers={"count": count},
        eval={"samples": samples},
    )
    assert config.accumulation(count) == accumulation
    again = from_yaml(to_yaml(config), "text")
    assert again == config and again.digest() == config.digest()
    assert validate(dump(config)) == config


@settings(max_examples=40)
@given(st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True))
@example("1e3")
@example("1.e-3")
@example("2024-13-45")
@example("null")
@example("no")
@example("0x1f")
@example("12")
def test_any_name_survives_yaml(name: str) -> None:
    config = changed(run={"name": name})
    assert from_yaml(to_yaml(config), "text") == config


@settings(max_examples=40)
@given(
    count=st.integers(1, 9) | st.tuples(st.integers(1, 4), st.integers(4, 9)),
    every=st.integers(1, 10**9) | st.sampled_from(["auto", "90s", "1.5m", "2h"]),
)
def test_an_elastic_count_and_any_interval_survive_yaml(count: int | tuple[int, int], every: int | str) -> None:
    config = changed(workers={"count": count}, checkpoint={"every": every}, train={"global_batch": 9})
    assert config.checkpoint.every == every and type(config.checkpoint.every) is type(every)
    assert (config.workers.least, config.workers.most) == (count if isinstance(count, tuple) else (count, count))
    assert from_yaml(to_yaml(config), "text") == config and validate(dump(config)) == config


def test_none_in_raw_survives_yaml() -> None:
    config = changed(zero={"raw": {"a": None, "b": [1e-3, "1e-3", None]}})
    assert from_yaml(to_yaml(config), "text") == config


def test_a_starting_point_survives_yaml() -> None:
    config = validate({**PLAIN, "model": {"from": "registry:lm@3"}})
    assert config.model.from_ == "registry:lm@3" and config.model.hidden_size is None
    assert dump(config)["model"]["from"] == "registry:lm@3"
    assert from_yaml(to_yaml(config), "text") == config


# Unknown keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", "trian: unknown key; did you mean train?"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean steps?"),
        ("zero.offload_optimizer.devise=cpu", "zero.offload_optimizer.devise: unknown key; did you mean device?"),
        ("data.tokenizer.fro=x", "data.tokenizer.fro: unknown key; did you mean from?"),
        ("publish.nam=x", "publish.nam: unknown key; did you mean name?"),
        ("eval.qqqq=3", "eval.qqqq: unknown key; known here: every, samples"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(file, [override])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.0.enginee=3", "models.0.enginee: unknown key; did you mean engine?"),
        ("models.1.engine.max_bach=3", "models.1.engine.max_bach: unknown key; did you mean max_batch?"),
        ("htpp.port=3", "htpp: unknown key; did you mean http?"),
    ],
)
def test_an_unknown_key_of_an_endpoint_names_the_nearest(endpoint: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(endpoint, [override], ServeConfig)
    assert str(raised.value) == message


def test_all_errors_are_named_at_once() -> None:
    raw = copy.deepcopy(PLAIN)
    raw["train"] |= {"lr": -1, "stepz": 3}
    del raw["workers"]
    with pytest.raises(ConfigError) as raised:
        validate(raw)
    for part in ("train.lr: Input should be greater than 0 (got -1)", "train.stepz: unknown", "workers: missing"):
        assert part in str(raised.value)


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=2.5E-4", "train.lr", 2.5e-4),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.steps=20", "train.steps", 20),
        ("data.pack=false", "data.pack", False),
        ("run.name=2024-01-01", "run.name", "2024-01-01"),
        ("run.name=nan", "run.name", "nan"),
        ("run.name='1e-3'", "run.name", "1e-3"),
        ("run.storage=s3://bucket/a=b", "run.storage", "s3://bucket/a=b"),
        ("data.source=[a, b]", "data.source", ["a", "b"]),
        ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
        ("data.tokenizer.vocab_size=300", "data.tokenizer.vocab_size", 300),
        ("zero.offload_optimizer.device=cpu", "zero.offload_optimizer.device", "cpu"),
        ("eval.samples=null", "eval.samples", None),
        ("zero={stage: 3}", "zero.stage", 3),
        ("workers.count=[2, 8]", "workers.count", (2, 8)),
        ("workers.count=3", "workers.count", 3),
        ("checkpoint.every=auto", "checkpoint.every", "auto"),
        ("checkpoint.every=90s", "checkpoint.every", "90s"),
        ("checkpoint.every=50", "checkpoint.every", 50),
    ],
)
def test_an_override_sets_a_value_of_its_type(file: Path, override: str, path: str, value: object) -> None:
    found: Any = load(file, [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_overrides_reach_into_lists(endpoint: Path) -> None:
    config = load(endpoint, ["models.1.cpus=2", "models.1.engine.threads=3", "http.port=0"], ServeConfig)
    assert [model.cpus for model in config.models] == [1, 2]
    assert config.models[1].engine.threads == 3 and config.http.port == 0


def test_overrides_fill_a_section_left_empty(file: Path) -> None:
    file.write_text(file.read_text() + "zero:\n")
    assert load(file, ["zero.stage=1"]).zero.stage == 1


def test_of_two_overrides_the_later_holds(file: Path) -> None:
    assert load(file, ["train.lr=1", "train.lr=2"]).train.lr == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: write it as section.key=value"),
        ("=3", "--set =3: write it as section.key=value"),
        ("train..steps=3", "--set train..steps=3: write it as section.key=value"),
        ("train.steps=[", "--set train.steps=[: while parsing"),
        ("train.steps.more=3", "--set train.steps.more=3: train.steps is not a section"),
        ("data.source.0=3", "--set data.source.0=3: data.source is not a section"),
    ],
)
def test_a_malformed_override_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(file, [override])
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize("override", ["models.2.cpus=2", "models.x.cpus=2", "models.-1.cpus=2", "models.cpus=2"])
def test_an_override_outside_of_a_list_is_named(endpoint: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"a list of 2 has no element .*: count from 0, as in models\.0\.cpus=2"):
        load(endpoint, [override], ServeConfig)


# Ranges and rules

RULES = [
    ({"run": {"name": "Upper"}}, "run.name: String should match pattern"),
    ({"run": {"name": "x" * 101}}, "run.name: String should have at most 100 characters"),
    ({"run": {"name": "../up"}}, "run.name: String should match pattern"),
    ({"run": {"seed": -1}}, "run.seed: Input should be greater than or equal to 0"),
    ({"run": {"seed": 2**31}}, "run.seed: Input should be less than 2147483648"),
    ({"task": {"kind": "juggling"}}, "task.kind: Input should be 'causal_lm'"),
    ({"data": {"source": 3}}, "data.source: Input should be a valid string (got 3); data.source: Input should be a"),
    ({"data": {"seq_len": 1}}, "data.seq_len: Input should be greater than or equal to 2"),
    ({"data": {"eval_fraction": 0.5}}, "data.eval_fraction: Input should be less than 0.5"),
    ({"data": {"tokenizer": {"vocab_size": 256}}}, "data.tokenizer.vocab_size: Input should be greater than or equal"),
    ({"data": {"format": "csv"}}, "data.format: Input should be 'auto', 'text', 'jsonl' or 'parquet'"),
    ({"model": {"hidden_size": None}}, "model: give hidden_size, or from"),
    ({"model": {"hidden_size": 9}}, "model: hidden_size 9 is not a multiple of heads 2"),
    ({"model": {"heads": 4, "kv_heads": 3}}, "model: heads 4 is not a multiple of kv_heads 3"),
    ({"model": {"arch": "gpt2", "kv_heads": 1}}, "model: arch gpt2 has no grouped-query attention: remove kv_heads"),
    ({"model": {"arch": "gpt2", "rope_theta": 5e5}}, "model: arch gpt2 learns its positions: remove rope_theta"),
    ({"model": {"dropout": 1}}, "model.dropout: Input should be less than 1"),
    ({"model": {"from": "x"}}, "model: from takes its shape from the model it loads: remove heads, hidden_size, lay"),
    ({"model": {"max_positions": 15}}, "data.seq_len 16 is over model.max_positions 15: lower it or raise that"),
    ({"train": {"steps": 0}}, "train.steps: Input should be greater than 0"),
    ({"train": {"lr": float("inf")}}, "train.lr: Input should be a finite number"),
    ({"train": {"lr": float("nan")}}, "train.lr: Input should be a finite number"),
    ({"train": {"lr": 0}}, "train.lr: Input should be greater than 0"),
    ({"train": {"min_lr_ratio": 1.1}}, "train.min_lr_ratio: Input should be less than or equal to 1"),
    ({"train": {"warmup_steps": 11}}, "train: warmup_steps 11 is more than steps 10"),
    ({"train": {"betas": [0.9, 1.0]}}, "train: betas (0.9, 1.0) must lie in [0, 1)"),
    ({"train": {"precision": "fp16"}}, "train.precision fp16 needs workers.gpus 1: use fp32 on CPU"),
    ({"train": {"precision": "fp8"}}, "train.precision: Input should be 'fp32', 'bf16' or 'fp16'"),
    ({"zero": {"stage": 4}}, "zero.stage: Input should be 0, 1, 2 or 3"),
    ({"zero": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "zero: offload_optimizer needs stage 1, 2 or 3"),
    ({"zero": {"offload_params": {"device": "cpu"}}}, "zero: offload_params needs stage 3, not 2"),
    (
        {"zero": {"offload_optimizer": {"device": "nvme", "path": "/x"}}},
        "zero: offload_optimizer to nvme needs",
    ),
    ({"zero": {"offload_optimizer": {"device": "nvme"}}}, "zero.offload_optimizer: path goes with device nvme"),
    ({"zero": {"offload_optimizer": {"path": "/x"}}}, "zero.offload_optimizer: path goes with device nvme"),
    ({"zero": {"hpz_partition_size": 8}}, "zero: hpz_partition_size needs stage 3, not 2: remove it, or set stage 3"),
    ({"zero": {"quantized_weights": False}}, "zero: quantized_weights needs stage 3"),
    ({"zero": {"prefetch_bucket_size": 0}}, "zero: prefetch_bucket_size needs stage 3"),
    ({"workers": {"count": 0}}, "workers.count: Input should be greater than 0"),
    ({"workers": {"count": [2]}}, "workers.count: [2] is no range: give one number of workers, or [least, most]"),
    ({"workers": {"count": [1, 2, 4]}}, "workers.count: [1, 2, 4] is no range"),
    ({"workers": {"count": [3, 2]}}, "workers: count [3, 2]: the least number of workers comes first"),
    ({"workers": {"count": 9}}, "train.global_batch 8 has no sample for each of workers.count 9: raise the first or"),
    ({"workers": {"count": [2, 9]}}, "train.global_batch 8 has no sample for each of workers.count 9: raise the"),
    ({"workers": {"resize_after_s": -1}}, "workers.resize_after_s: Input should be greater than or equal to 0"),
    ({"workers": {"gpus": 2}}, "workers.gpus: Input should be less than or equal to 1"),
    (
        {"checkpoint": {"every": 0}},
        "checkpoint.every: 0 is no interval: give steps such as 100, a time such as 90s, 10m or 2h, or auto",
    ),
    ({"checkpoint": {"every": "often"}}, "checkpoint.every: 'often' is no interval"),
    ({"checkpoint": {"every": "-90s"}}, "checkpoint.every: '-90s' is no interval"),
    ({"checkpoint": {"every": "10 m"}}, "checkpoint.every: '10 m' is no interval"),
    ({"checkpoint": {"every": "3d"}}, "checkpoint.every: '3d' is no interval"),
    ({"checkpoint": {"every": "0s"}}, "checkpoint.every: '0s' is no interval"),
    ({"checkpoint": {"retry_s": -1}}, "checkpoint.retry_s: Input should be greater than or equal to 0"),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep: Input should be greater than 0"),
    ({"eval": {"every": 0}}, "eval.every: Input should be greater than 0"),
    ({"publish": {}}, "publish.name: missing"),
    ({"publish": {"name": "Big"}}, "publish.name: String should match pattern"),
]


@pytest.mark.parametrize(("sections", "message"), RULES, ids=[message[:50] for _, message in RULES])
def test_what_is_wrong_is_refused_by_its_name(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        changed(**sections)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": [{"model": "lm@1"}, {"model": "lm@2"}]}, "models: lm is served twice: set served_as"),
        ({"models": [{"model": "lm"}], "http": {"port": 65536}}, "http.port: Input should be less than 65536"),
        (
            {"models": [{"model": "lm", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}]},
            "models.0.autoscaling: min_replicas 3 is more than max_replicas 2",
        ),
        ({"models": [{"model": "lm", "engine": {"dtype": "int8"}}]}, "models.0.engine.dtype: Input should be 'auto'"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_refused_by_its_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(raw, ServeConfig)
    assert str(raised.value).startswith(message)


def test_two_versions_are_served_under_two_names() -> None:
    config = validate({"models": [{"model": "lm@1"}, {"model": "lm@2", "served_as": "next"}]}, ServeConfig)
    assert [model.public_name for model in config.models] == ["lm", "next"]


def test_configs_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        changed().train.steps = 3  # type: ignore[misc]


def test_the_run_directory() -> None:
    assert changed(run={"storage": "s3://bucket/runs/"}).place == "s3://bucket/runs/test"


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "accumulation"),
    [(8, 2, 1, 4), (8, 2, 2, 2), (8, 2, 3, 2), (8, 2, 4, 1), (8, 2, 8, 1), (7, 2, 2, 2), (7, 3, 3, 1), (1, 4, 1, 1)],
)
def test_micro_batches_hold_every_workers_share(
    global_batch: int, micro_batch: int, world_size: int, accumulation: int
) -> None:
    config = changed(train={"global_batch": global_batch, "micro_batch": micro_batch}, workers={"count": 1})
    assert config.accumulation(world_size) == accumulation


# Meaning

FREE = [
    {"run": {"storage": "/else"}},
    {"data": {"prepared": "/else"}},
    {"publish": {"name": "lm"}},
    {"train": {"micro_batch": 4, "activation_checkpointing": True, "report_every": 1}},
    {"zero": {"stage": 3, "raw": {"a": {"b": 1}}}},
    {"workers": {"count": [1, 4], "cpus": 2}},
    {"checkpoint": {"every": "auto", "keep": 1}},
    {"eval": {"every": 7, "samples": 5}},
]


@pytest.mark.parametrize("sections", FREE, ids=lambda sections: next(iter(sections)))
def test_what_shapes_no_result_has_no_meaning(sections: dict[str, dict[str, Any]]) -> None:
    assert changed(**sections).digest() == changed().digest()
    assert difference(changed(), changed(**sections)) == []
    assert changed_settings(changed(), changed(**sections)) != []
    assert validate({**PLAIN, "registry": "/else"}).digest() == changed().digest()


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"train": {"lr": 2e-3}}, "train.lr: 0.001 -> 0.002"),
        ({"run": {"seed": 18}}, "run.seed: 17 -> 18"),
        ({"train": {"global_batch": 9}}, "train.global_batch: 8 -> 9"),
        ({"train": {"precision": "bf16"}}, "train.precision: fp32 -> bf16"),
        ({"model": {"dropout": 0.1}}, "model.dropout: 0.0 -> 0.1"),
        ({"data": {"source": ["texts"]}}, "data.source: texts -> ['texts']"),
    ],
)
def test_what_shapes_the_result_has_meaning(sections: dict[str, dict[str, Any]], line: str) -> None:
    assert changed(**sections).digest() != changed().digest()
    assert line in difference(changed(), changed(**sections))


def test_differences_are_sorted_lines() -> None:
    lines = difference(changed(), changed(train={"steps": 20, "lr": 1.0}, run={"name": "other"}))
    assert lines == ["run.name: test -> other", "train.lr: 0.001 -> 1.0", "train.steps: 10 -> 20"]


def test_changed_settings_name_also_what_has_no_meaning() -> None:
    lines = changed_settings(changed(), changed(train={"lr": 1.0}, workers={"count": [2, 4]}, zero={"stage": 3}))
    assert lines == ["train.lr: 0.001 -> 1.0", "workers.count: 2 -> [2, 4]", "zero.stage: 2 -> 3"]
    assert changed_settings(changed(), changed()) == []


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of sections, not NoneType"),
        (b"- a\n- b\n", "must be a mapping of sections, not list"),
        (b"train: [", "cannot read config"),
        (b"train: {a: 1\n b: 2}", "cannot read config"),
        (b"train:\n\tsteps: 3", "cannot read config"),
        (b"\xff\xfe", "cannot read config .*utf-8"),
        (b"run: !!python/object:os.system {}", "cannot read config"),
        (b"run: {name: a}\nrun: {name: b}", "cannot read config .*: run is given twice .*line 2"),
        (b"1: 2", "1: Keys should be strings"),
        (b"run: 3", "run: Input should be a valid dictionary or instance of RunConfig"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load(tmp_path / "bad.yaml")
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read config {path}: "):
            load(path)


def test_a_file_reads_exponents_as_numbers(file: Path) -> None:
    text = "zero: {raw: {x: 1e-3}}\n"
    file.write_text(file.read_text() + text)
    assert load(file).zero.raw == {"x": 1e-3}
