"""Which engine serves a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from raymodels.config import EngineConfig
from raymodels.serve.engine import NO_ADAPTERS, Engine


def open_engine(
    model_dir: str, config: EngineConfig, threads: int, adapters: Mapping[str, str] = NO_ADAPTERS
) -> Engine:
    """Start the engine that ``engine.kind`` names; ``auto`` is vLLM on a GPU where it is installed.

    Args:
        adapters: name -> folder in PEFT's format.

    Raises:
        AdapterError: an adapter cannot be used with the model; says why.
        ServeError: the directory cannot be served; says why.
    """
    kind = config.kind
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        from raymodels.serve.vllm_engine import VllmEngine

        return VllmEngine(model_dir, config, threads, adapters)
    from raymodels.serve.transformers_engine import TransformersEngine

    return TransformersEngine(model_dir, config, threads, adapters)
