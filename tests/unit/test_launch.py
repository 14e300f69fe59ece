"""What a driver makes of an attempt's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymodels import storage
from raymodels.errors import TrainingError
from raymodels.train import launch
from tests.conftest import altered

pytestmark = pytest.mark.slow


def test_out_of_memory_ends_the_run_with_the_planners_estimate(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU's memory can run out here; what torch raises there is raised in its place."""

    def runs_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(launch, "run_attempt", runs_out)
    config, events = altered(tiny, tmp_path), list[dict[str, Any]]()
    with pytest.raises(TrainingError, match=r"Tried to allocate 2.*train\.micro_batch.*estimate.*GB a worker"):
        launch.train(config, events.append)
    [failed] = [event for event in events if event["kind"] == "failed"]
    assert failed["fault"] == "out_of_memory_device" and not failed["retry"]
    assert "the planner's estimate" in storage.read_bytes(f"{config.place}/log/attempt-1.txt").decode()
