"""A committed checkpoint -> a registry version that says where it came from."""

from __future__ import annotations

import tempfile

from raymodels import manifest
from raymodels.checkpoint.export import export
from raymodels.checkpoint.layout import Checkpoint
from raymodels.config import Config, dump
from raymodels.registry import Registry, Version


def publish(config: Config, checkpoint: Checkpoint) -> Version:
    """Export a checkpoint of a run and publish it as ``config.publish`` says.

    A checkpoint that is published under this name already is not published again; its version is returned. Its alias
    is moved to it once: a finished run that is started again takes nothing back from the versions after it.

    Raises:
        IntegrityError: the checkpoint or the copy is damaged.
    """
    assert config.publish is not None
    registry, name, state = Registry(config.registry), config.publish.name, checkpoint.state()
    card = {
        "run": config.run.name,
        "config": dump(config),
        "config_digest": state.config_digest,
        "data_fingerprint": state.data_fingerprint,
        "step": state.step,
        "tokens": state.tokens,
        "metrics": state.metrics,
        "checkpoint": checkpoint.place,
        "checkpoint_digest": manifest.digest(checkpoint.place),
    }
    version = next(
        (v for v in registry.versions(name) if v.card.get("checkpoint_digest") == card["checkpoint_digest"]), None
    )
    if version is None:
        with tempfile.TemporaryDirectory(prefix="raymodels-export-") as folder:
            export(checkpoint, folder)
            version = registry.publish(name, folder, card)
    if (alias := config.publish.alias) and not registry.has_held(name, alias, version.number):
        registry.set_alias(name, alias, version.number)
    return version
