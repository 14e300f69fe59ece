"""Our config -> DeepSpeed's. Pure, and the one place where DeepSpeed's keys are written."""

from __future__ import annotations

from typing import Any

from raymodels.config import Config, OffloadConfig, ZeroConfig
from raymodels.errors import ConfigError

# Our name -> DeepSpeed's, for settings that are passed on as they are.
PASSED_ON = {
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "reduce_scatter": "reduce_scatter",
    "round_robin_gradients": "round_robin_gradients",
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "sub_group_size": "sub_group_size",
    "hpz_partition_size": "zero_hpz_partition_size",
    "quantized_weights": "zero_quantized_weights",
    "quantized_gradients": "zero_quantized_gradients",
}
# DeepSpeed's keys that our schema says elsewhere, or that would take over what the loop does.
OURS = {
    "optimizer": "train",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip_norm",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
}
# DeepSpeed also takes its stage3_ keys without that prefix, which are our names.
OURS_IN_ZERO = {key: f"zero.{ours}" for ours, theirs in PASSED_ON.items() for key in (ours, theirs)} | {
    "stage": "zero.stage",
    "offload_optimizer": "zero.offload_optimizer",
    "offload_param": "zero.offload_params",
    "cpu_offload": "zero.offload_optimizer",
    "cpu_offload_param": "zero.offload_params",
    "cpu_offload_use_pin_memory": "zero.offload_optimizer.pin_memory and zero.offload_params.pin_memory",
}


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize`` on so many ranks.

    DeepSpeed wants batch sizes whose product is exact; where the workers do not divide the global batch, its train
    batch counts the empty rows that fill up. What is averaged is for the loop to say, so that is but bookkeeping.

    Raises:
        ConfigError: ``zero.raw`` contradicts a setting of ours; names both.
    """
    derived = {
        "train_batch_size": config.train.micro_batch * config.accumulation(world_size) * world_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.train.clip_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": config.train.precision == "fp16"},
        "optimizer": _optimizer(config),
        "zero_optimization": _zero(config.zero),
        # The loop decides what is printed; DeepSpeed's own step prints are off.
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    _refuse_ours(config.zero.raw)
    return _merged(derived, config.zero.raw, "zero.raw")


def _refuse_ours(raw: dict[str, Any]) -> None:
    for key in raw:
        if key in OURS:
            raise ConfigError(f"zero.raw.{key}: say it with {OURS[key]}")
    section = raw.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigError(f"zero.raw.zero_optimization is {section!r}, not a section; say its stage with zero.stage")
    for key in section:
        if key in OURS_IN_ZERO:
            raise ConfigError(f"zero.raw.zero_optimization.{key}: say it with {OURS_IN_ZERO[key]}")


def _optimizer(config: Config) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": config.train.lr,
        "betas": list(config.train.betas),
        "eps": config.train.eps,
        "weight_decay": config.train.weight_decay,
        "adam_w_mode": True,
    }
    if config.zero.offload_optimizer.device == "none" or config.zero.raw.get("zero_force_ds_cpu_optimizer") is False:
        # torch's AdamW needs no compiled kernel; DeepSpeedCPUAdam, which offloading takes unless told not to, does.
        params["torch_adam"] = True
    return {"type": "AdamW", "params": params}


def _zero(zero: ZeroConfig) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": zero.stage}
    for ours, theirs in PASSED_ON.items():
        if (value := getattr(zero, ours)) is not None:
            section[theirs] = value
    if zero.offload_optimizer.device != "none":
        section["offload_optimizer"] = _offload(zero.offload_optimizer)
    if zero.offload_params.device != "none":
        section["offload_param"] = _offload(zero.offload_params)
    return section


def _offload(offload: OffloadConfig) -> dict[str, Any]:
    section: dict[str, Any] = {"device": offload.device, "pin_memory": offload.pin_memory}
    if offload.path is not None:
        section["nvme_path"] = offload.path
    if offload.buffer_count is not None:
        section["buffer_count"] = offload.buffer_count
    return section


def _merged(derived: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in raw.items():
        here = f"{path}.{key}"
        if isinstance(value, dict) and isinstance(derived.get(key, {}), dict):
            merged[key] = _merged(derived.get(key, {}), value, here)
        elif key in derived and derived[key] != value:
            raise ConfigError(f"{here} is {value!r}, but the config says {derived[key]!r}: remove it from zero.raw")
        else:
            merged[key] = value
    return merged
