"""Which engine serves a model."""

from __future__ import annotations

import importlib.util

import torch

from raymodels.config import EngineConfig
from raymodels.serve.engine import Engine


def open_engine(model_dir: str, config: EngineConfig, threads: int) -> Engine:
    """Start the engine that ``engine.kind`` names; ``auto`` is vLLM on a GPU where it is installed.

    Raises:
        ServeError: the directory cannot be served; says why.
    """
    kind = config.kind
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        from raymodels.serve.vllm_engine import VllmEngine

        return VllmEngine(model_dir, config, threads)
    from raymodels.serve.transformers_engine import TransformersEngine

    return TransformersEngine(model_dir, config, threads)
