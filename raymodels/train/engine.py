"""Make one rank's DeepSpeed engine: the model, its parameter groups, the partitioning."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from raymodels.config import Config, ModelConfig
from raymodels.models.build import DTYPES, construct, initialize, load
from raymodels.train import zero


def join_process_group() -> None:
    """Have DeepSpeed use the torch.distributed process group that this process is in already."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Told nothing, DeepSpeed probes every kernel with the compiler and builds one for collectives of CPU inference,
    # which takes over a minute, once. Training uses none; an offloaded optimizer's kernel is built without asking here.
    deepspeed.ops.__compatible_ops__ = {}
    _import_muon_uncompiled()
    deepspeed.init_distributed(dist_init_required=False)


def _import_muon_uncompiled() -> None:
    """Spare every start torch's compiler: DeepSpeed imports its Muon optimizer, which compiles as it is imported.

    That is 2 s a worker, for an optimizer that is not offered here.
    """
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler


def make_model(config: Config, source: ModelConfig, architecture: PreTrainedConfig) -> PreTrainedModel:
    """The model on this rank: equal weights whatever the ZeRO stage, partitioned from the start at stage 3."""
    dtype, partitioned = DTYPES[config.train.precision], config.zero.stage == 3
    if source.from_ is not None:
        # transformers looks for a live HfDeepSpeedConfig to know that weights must be partitioned as they are loaded.
        alive = HfDeepSpeedConfig(zero.deepspeed_config(config, dist.get_world_size())) if partitioned else None
        model = load(source.from_, architecture, dtype)
        del alive
    elif partitioned:
        with deepspeed.zero.Init(config_dict_or_path=zero.deepspeed_config(config, dist.get_world_size())):
            model = construct(architecture, dtype)
        initialize(model, config.run.seed, lambda some: deepspeed.zero.GatheredParameters(some, modifier_rank=0))
    else:
        model = construct(architecture, dtype)
        initialize(model, config.run.seed, nullcontext)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_engine(config: Config, model: torch.nn.Module) -> Any:
    """Wrap the model in a DeepSpeed engine with its AdamW."""
    groups = parameter_groups(model, config.train.weight_decay)
    derived = zero.deepspeed_config(config, dist.get_world_size())
    with redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=derived)
    if config.zero.stage == 0 and config.train.precision != "fp32":
        _undo_first_step(engine)
    return engine


def own_loss_scale(engine: Any) -> float:
    """What to multiply the loss of the coming step by here; the norm that DeepSpeed then tells is so scaled too.

    At stage 0 in fp16 DeepSpeed 0.19 divides the gradients by its loss scale, but never multiplied the loss by it
    (`DeepSpeedEngine.backward` does for optimizers of ZeRO alone): AdamW would see gradients 65,536 times too small,
    among which its ``eps`` counts, and nothing would ever be clipped.
    """
    if engine.zero_optimization_stage() == 0 and engine.fp16_enabled():
        return float(engine.optimizer.loss_scale_config.cur_scale)
    return 1.0


def _undo_first_step(engine: Any) -> None:
    """Stage 0 in half precision: take back the step without gradients by which DeepSpeed 0.19 allocates the moments.

    It leaves AdamW's count at one, so that the first real update is 0.735 times what it should be, and has decayed the
    float32 weights once.
    """
    for params, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            engine.optimizer.optimizer.state.pop(master, None)
            master.data.copy_(param.data)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases and norm weights) do not."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        # A parameter partitioned by ZeRO-3 is empty here and keeps its real shape beside it.
        (matrices if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def read_assets(architecture: PreTrainedConfig, tokenizer_dir: str) -> dict[str, bytes]:
    """Config and tokenizer as files, name -> content: what a checkpoint carries beside the weights."""
    with tempfile.TemporaryDirectory(prefix="raymodels-assets-") as folder:
        architecture.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
