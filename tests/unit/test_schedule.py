"""The learning rate against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymodels.config import TrainConfig
from raymodels.train.schedule import learning_rate

SCHEDULES = ["cosine", "linear", "constant"]


def train(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "global_batch": 1, "micro_batch": 1, "lr": 2.0, "min_lr_ratio": 0.1, **keys})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_to_the_rate(schedule: Any) -> None:
    settings = train(schedule=schedule, warmup_steps=10)
    assert [learning_rate(settings, step) for step in range(10)] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert learning_rate(settings, 10) == 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_rate(schedule: Any) -> None:
    assert learning_rate(train(schedule=schedule), 0) == 2.0


@pytest.mark.parametrize("step", range(20, 121, 10))
def test_closed_forms(step: int) -> None:
    share = min(1.0, (step - 20) / 80)
    cosine, linear, constant = (learning_rate(train(schedule=s, warmup_steps=20), step) for s in SCHEDULES)
    assert cosine == pytest.approx(0.2 + 1.8 * math.cos(math.pi * share / 2) ** 2)
    assert linear == pytest.approx(2.0 - 1.8 * share)
    assert constant == 2.0


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.2), ("linear", 0.2), ("constant", 2.0)])
def test_the_end_is_kept(schedule: Any, end: float) -> None:
    assert [learning_rate(train(schedule=schedule), step) for step in (100, 101, 10**9)] == pytest.approx([end] * 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_may_be_all_warm_up(schedule: Any) -> None:
    rates = [learning_rate(train(schedule=schedule, steps=4, warmup_steps=4), step) for step in range(4)]
    assert rates == [0.5, 1.0, 1.5, 2.0]


@given(
    steps=st.integers(1, 400),
    share=st.floats(0, 1),
    ratio=st.floats(0, 1),
    lr=st.floats(1e-6, 10),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rises_then_falls_within_bounds(steps: int, share: float, ratio: float, lr: float, schedule: Any) -> None:
    warm = int(share * steps)
    settings = train(steps=steps, warmup_steps=warm, min_lr_ratio=ratio, lr=lr, schedule=schedule)
    rates = [learning_rate(settings, step) for step in range(steps + 1)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    assert all(one < other for one, other in pairwise(rates[:warm]))
    assert all(one >= other - 1e-12 * lr for one, other in pairwise(rates[warm:]))
