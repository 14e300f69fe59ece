"""Where a run's model starts from. Imports nothing of DeepSpeed: the driver asks this too."""

from __future__ import annotations

from raymodels.config import Config, ModelConfig
from raymodels.registry import PREFIX, Registry


def starting_point(config: Config) -> ModelConfig:
    """``config.model`` with a registry reference in ``from`` replaced by this host's verified copy of that version."""
    if not (config.model.from_ or "").startswith(PREFIX):
        return config.model
    assert config.model.from_
    return config.model.model_copy(update={"from_": Registry(config.registry).resolve(config.model.from_).fetch()})
