"""What publishing a checkpoint again does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymodels import manifest, storage
from raymodels.checkpoint import layout
from raymodels.publish import publish
from raymodels.registry import Registry
from tests.conftest import altered


def test_a_finished_run_that_is_started_again_takes_no_alias_back(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = altered(tiny, tmp_path, registry=str(tmp_path / "registry"), publish={"name": "lm", "alias": "prod"})
    place, model = layout.step_place(config.place, 4), tmp_path / "model"
    state = layout.State(4, 0, 1, 2, "fp32", config.digest(), "", {})
    storage.write_bytes(f"{place}/{layout.STATE}", layout.to_json(state))
    manifest.commit(place, manifest.describe(place))
    for name in ("config.json", "model.safetensors"):
        storage.write_bytes(f"{model}/{name}", b"1")
    registry = Registry(config.registry)
    registry.publish("lm", str(model), {"checkpoint_digest": manifest.digest(place)})  # and died before the alias
    checkpoint = layout.Checkpoint(place, 4)
    assert publish(config, checkpoint).number == registry.aliases("lm")["prod"] == 1
    registry.publish("lm", str(model), {}, alias="prod")  # by another run
    assert publish(config, checkpoint).number == 1
    assert registry.aliases("lm") == {"prod": 2}
