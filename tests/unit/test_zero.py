"""The dict that DeepSpeed is given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymodels.config import Config, ZeroConfig, load, validate
from raymodels.errors import ConfigError
from raymodels.train.zero import OURS, deepspeed_config

pytestmark = pytest.mark.slow

CONFIGS = [path for path in sorted((Path(__file__).parents[2] / "jobs/configs").glob("*.yaml")) if path.stem != "serve"]
# Each setting of ZeroConfig -> a value, the stage that allows it, and where in zero_optimization it arrives as what.
ARRIVALS: dict[str, tuple[Any, int, str, Any]] = {
    "stage": (1, 1, "stage", 1),
    "offload_optimizer": ({"device": "cpu"}, 2, "offload_optimizer", {"device": "cpu", "pin_memory": True}),
    "offload_params": ({"device": "cpu"}, 3, "offload_param", {"device": "cpu", "pin_memory": True}),
    "overlap_comm": (True, 2, "overlap_comm", True),
    "contiguous_gradients": (False, 2, "contiguous_gradients", False),
    "reduce_scatter": (False, 2, "reduce_scatter", False),
    "round_robin_gradients": (True, 2, "round_robin_gradients", True),
    "reduce_bucket_size": (7, 2, "reduce_bucket_size", 7),
    "allgather_bucket_size": (7, 2, "allgather_bucket_size", 7),
    "prefetch_bucket_size": (0, 3, "stage3_prefetch_bucket_size", 0),
    "param_persistence_threshold": (0, 3, "stage3_param_persistence_threshold", 0),
    "max_live_parameters": (7, 3, "stage3_max_live_parameters", 7),
    "max_reuse_distance": (0, 3, "stage3_max_reuse_distance", 0),
    "sub_group_size": (7, 3, "sub_group_size", 7),
    "hpz_partition_size": (2, 3, "zero_hpz_partition_size", 2),
    "quantized_weights": (True, 3, "zero_quantized_weights", True),
    "quantized_gradients": (True, 3, "zero_quantized_gradients", True),
    "raw": ({"zero_optimization": {"ignore_unused_parameters": False}}, 2, "ignore_unused_parameters", False),
}


def config(zero: dict[str, Any], **train: Any) -> Config:
    return validate(
        {
            "run": {"name": "test"},
            "data": {"source": "texts", "seq_len": 16},
            "model": {"hidden_size": 8, "layers": 1, "heads": 2},
            "train": {"steps": 10, "global_batch": 8, "micro_batch": 2, "lr": 1e-3, **train},
            "zero": zero,
            "workers": {"count": 2, "gpus": 1},
        }
    )


def derived(config: Config) -> dict[str, Any]:
    """What DeepSpeed is given on as many workers as the config takes at most."""
    return deepspeed_config(config, config.workers.most)


@pytest.fixture(scope="module")
def parser() -> Iterator[Any]:
    """DeepSpeed's own parser of its config, for any number of workers."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm
    import deepspeed.ops
    import torch.distributed as dist
    from deepspeed.runtime.config import DeepSpeedConfig

    class Group:
        def __init__(self, workers: int) -> None:
            self.workers = workers

        def get_data_parallel_world_size(self) -> int:
            return self.workers

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is communicated here: without its operator for that, which takes a minute to compile the first time.
        patch.setitem(vars(deepspeed.ops), "__compatible_ops__", {})
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    yield lambda config, workers: DeepSpeedConfig(deepspeed_config(config, workers), mpu=Group(workers))
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_shipped_config(parser: Any, path: Path) -> None:
    ours = load(path)
    theirs = parser(ours, ours.workers.most)
    assert theirs.train_batch_size == ours.train.global_batch
    assert theirs.train_micro_batch_size_per_gpu == ours.train.micro_batch
    assert theirs.gradient_accumulation_steps == ours.accumulation(ours.workers.most)
    assert theirs.gradient_clipping == ours.train.clip_norm
    assert theirs.zero_config.stage == ours.zero.stage
    assert theirs.bfloat16_config.enabled == (ours.train.precision == "bf16")


@pytest.mark.parametrize(
    ("workers", "accumulation", "counted"), [(1, 4, 8), (2, 2, 8), (3, 2, 12), (4, 1, 8), (5, 1, 10), (8, 1, 16)]
)
def test_deepspeed_accepts_workers_that_do_not_divide_the_batch(
    parser: Any, workers: int, accumulation: int, counted: int
) -> None:
    theirs = parser(config({}), workers)
    assert (theirs.gradient_accumulation_steps, theirs.train_batch_size) == (accumulation, counted)
    assert theirs.train_micro_batch_size_per_gpu == 2


@pytest.mark.parametrize("field", ZeroConfig.model_fields)
def test_every_setting_reaches_deepspeed(parser: Any, field: str) -> None:
    value, stage, key, arrived = ARRIVALS[field]
    ours = config({"stage": stage, field: value})
    assert derived(ours)["zero_optimization"][key] == arrived
    read = parser(ours, 2).zero_config.model_dump()
    found = read[key] if key in read else read[key.removeprefix("stage3_")]
    assert found == arrived or {k: found[k] for k in arrived} == arrived
    assert key == "stage" or key not in derived(config({"stage": stage}))["zero_optimization"]


def test_every_setting_of_an_offload_reaches_deepspeed(parser: Any, tmp_path: Path) -> None:
    offload = {"device": "nvme", "path": str(tmp_path), "pin_memory": False, "buffer_count": 6}
    ours = config({"stage": 3, "offload_optimizer": offload, "offload_params": offload})
    section = derived(ours)["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        assert section[key] == {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False, "buffer_count": 6}
        assert getattr(parser(ours, 2).zero_config, key).buffer_count == 6


def test_the_whole_dict() -> None:
    assert derived(config({"stage": 2, "overlap_comm": True}, precision="bf16", clip_norm=0.5)) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": 0.1,
                "adam_w_mode": True,
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unset_settings_are_left_to_deepspeed(stage: int) -> None:
    assert derived(config({"stage": stage}))["zero_optimization"] == {"stage": stage}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(precision: str) -> None:
    found = derived(config({}, precision=precision))
    assert [key for key in ("bf16", "fp16") if found[key]["enabled"]] == [precision] * (precision != "fp32")


def test_an_offloaded_optimizer_is_deepspeeds_own() -> None:
    found = derived(config({"stage": 2, "offload_optimizer": {"device": "cpu"}}))
    assert "torch_adam" not in found["optimizer"]["params"]


def test_raw_adds_what_has_no_setting() -> None:
    raw = {"flops_profiler": {"enabled": True}, "zero_optimization": {"leaf_module": {"classes": ["X"]}}}
    found = derived(config({"stage": 3, "raw": raw}))
    assert found["flops_profiler"] == {"enabled": True}
    assert found["zero_optimization"] == {"stage": 3, "leaf_module": {"classes": ["X"]}}


def test_raw_may_say_what_is_so() -> None:
    ours = config({"raw": {"wall_clock_breakdown": False}})
    assert derived(ours) == derived(config({}))


@pytest.mark.parametrize(("key", "setting"), OURS.items())
def test_raw_may_not_say_what_has_a_setting(key: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"zero\.raw\.{key}: say it with {setting}"):
        derived(config({"raw": {key: {}}}))


@pytest.mark.parametrize("field", [field for field in ZeroConfig.model_fields if field != "raw"])
def test_raw_may_not_say_what_zero_says(field: str) -> None:
    for key in {ARRIVALS[field][2], ARRIVALS[field][2].removeprefix("stage3_")}:
        with pytest.raises(ConfigError, match=rf"zero\.raw\.zero_optimization\.{key}: say it with zero\.{field}"):
            derived(config({"raw": {"zero_optimization": {key: 1}}}))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"steps_per_print": 5}, r"zero\.raw\.steps_per_print is 5, but the config says 2147483647"),
        ({"wall_clock_breakdown": True}, r"zero\.raw\.wall_clock_breakdown is True, but the config says False"),
        ({"zero_optimization": 3}, r"zero\.raw\.zero_optimization is 3, not a section"),
        ({"zero_optimization": {"cpu_offload": True}}, r"cpu_offload: say it with zero\.offload_optimizer"),
    ],
)
def test_a_contradiction_in_raw_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        derived(config({"raw": raw}))


def test_offload_takes_torchs_adam_where_deepspeeds_is_not_wanted() -> None:
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "torch_adam" not in derived(config(offloaded))["optimizer"]["params"]
    own = derived(config(offloaded | {"raw": {"zero_force_ds_cpu_optimizer": False}}))
    assert own["optimizer"]["params"]["torch_adam"] is True
