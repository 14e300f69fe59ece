"""A loss that is no number ends the run with a remedy instead of training on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymodels.config import Config
from raymodels.errors import TrainingError
from raymodels.testing import run_ranks, train_here
from tests.conftest import altered


def ending(config: Config, prepared: str) -> str:
    try:
        train_here(config, prepared)
    except TrainingError as error:
        return str(error)
    return "finished"


def test_every_rank_says_so(tiny: dict[str, Any], tiny_model_dir: Path, prepared: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    config = altered({**tiny, "model": {"from": str(tmp_path / "broken")}}, tmp_path)
    answers = run_ranks(ending, 2, config, prepared)
    assert answers[0] == answers[1]
    assert answers[0].startswith("the loss is nan at step 1: lower train.lr")
