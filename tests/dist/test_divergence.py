"""A loss that is no number ends the run with a remedy instead of training on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymodels.config import Config
from raymodels.errors import TrainingError
from raymodels.testing import run_ranks
from raymodels.train.meter import Phases
from tests.conftest import altered


def ending(config: Config, prepared: str) -> str:
    from raymodels.train import loop

    session = loop.open_session(config, prepared, 0, Phases())
    try:
        loop.train(session, Phases(), lambda metrics: None)
    except TrainingError as error:
        return str(error)
    return "finished"


def test_every_rank_says_so(tiny: dict[str, Any], prepared: str, tmp_path: Path) -> None:
    wild = {"steps": 10, "lr": 1e38, "warmup_steps": 0, "clip_norm": 0.0}
    answers = run_ranks(ending, 2, altered(tiny, tmp_path, train=wild), prepared)
    assert answers[0] == answers[1]
    assert "lower train.lr" in answers[0]
