"""The result does not depend on how it is computed: ZeRO stage, workers, micro batch, accumulation."""

from __future__ import annotations

from typing import Any

import pytest

from raymodels.config import Config
from raymodels.testing import run_ranks, train_here
from tests.conftest import altered

STEPS = 20
TOLERANCE = 1e-5


def losses(config: Config, prepared: str) -> list[float]:
    return [report["loss"] for report in train_here(config, prepared)[1]]


@pytest.fixture(scope="module")
def setting(tiny: dict[str, Any], prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(workers: int, **sections: dict[str, Any]) -> list[list[float]]:
        sections["train"] = {"steps": STEPS, "micro_batch": 4, **sections.get("train", {})}
        quiet = {"checkpoint": {"every": STEPS}, "eval": {"every": STEPS}, "workers": {"count": workers}}
        config = altered(tiny, tmp_path_factory.mktemp("run"), **quiet, **sections)
        return run_ranks(losses, workers, config, prepared)

    return run


@pytest.fixture(scope="module")
def reference(setting: Any) -> dict[bool, list[float]]:
    return {pack: setting(1, zero={"stage": 0}, data={"pack": pack})[0] for pack in (True, False)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gives_the_same_losses(setting: Any, reference: dict[bool, list[float]], stage: int) -> None:
    for rank in setting(2, zero={"stage": stage}):
        assert rank == pytest.approx(reference[True], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "workers"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]
)
def test_every_factoring_gives_the_same_losses(
    setting: Any, reference: dict[bool, list[float]], micro_batch: int, accumulation: int, workers: int
) -> None:
    """Documents of uneven length, unpacked: the mean must be over the tokens of the whole global batch."""
    assert micro_batch * accumulation * workers == 8
    found = setting(workers, data={"pack": False}, train={"micro_batch": micro_batch})
    for rank in found:
        assert rank == pytest.approx(reference[False], abs=TOLERANCE)


def test_workers_that_do_not_divide_the_global_batch_give_the_same_losses(
    setting: Any, reference: dict[bool, list[float]]
) -> None:
    for pack in (True, False):
        for rank in setting(3, data={"pack": pack}, train={"micro_batch": 2}):
            assert rank == pytest.approx(reference[pack], abs=TOLERANCE)


def test_losses_fall(reference: dict[bool, list[float]]) -> None:
    for curve in reference.values():
        assert len(curve) == STEPS
        assert curve[-1] < curve[0] - 1
