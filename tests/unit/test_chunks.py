"""Chunks of prompts: as large as a step's time allows, whatever the model and the machine."""

from __future__ import annotations

import random

import pytest

from raymodels.serve.chunks import LEAST, STEP_S, Chunks


@pytest.mark.parametrize("base_s", [0.002, 0.09])
@pytest.mark.parametrize("token_s", [0.00005, 0.001, 0.004])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_step_comes_to_take_the_time_that_it_may(base_s: float, token_s: float, noise: float) -> None:
    chunks, draw, taken = Chunks(512), random.Random(1), list[float]()
    for _ in range(60):
        size = chunks.size(False)
        seconds = (base_s + token_s * size) * (1 + draw.uniform(0, noise))
        chunks.measured(seconds, {False: size, True: 0})
        taken.append(seconds)
    assert max(taken[3:]) <= 1.02 * STEP_S * (1 + noise) ** 2
    fits = min(512, (STEP_S - base_s) / token_s)
    assert max(LEAST, 0.5 * fits) <= chunks.size(False) <= 512


def test_tokens_that_are_scored_have_a_size_of_their_own() -> None:
    chunks = Chunks(512)
    for _ in range(60):
        plain, scored = chunks.size(False) // 2, chunks.size(True) // 2
        chunks.measured(0.05 + 0.0005 * plain + 0.003 * scored, {False: plain, True: scored})
    for _ in range(20):
        scored = chunks.size(True)
        chunks.measured(0.05 + 0.003 * scored, {False: 0, True: scored})
    assert 0.05 + 0.003 * chunks.size(True) == pytest.approx(STEP_S, rel=0.1)


def test_a_slow_model_computes_prompts_all_the_same() -> None:
    chunks = Chunks(512)
    for _ in range(30):
        chunks.measured(0.5, {False: 0, True: 0})
    for _ in range(30):
        chunks.measured(0.5 + 0.01 * chunks.size(False), {False: chunks.size(False), True: 0})
    assert chunks.size(False) == pytest.approx(50, rel=0.1)  # a step takes twice as long as without a prompt


def test_what_a_short_prompt_takes_says_little_of_long_ones() -> None:
    chunks = Chunks(512)
    for _ in range(20):
        chunks.measured(0.09, {False: 4, True: 0})
    before = chunks.size(False)
    chunks.measured(0.09, {False: before, True: 0})
    assert before == 64 < chunks.size(False)


def test_never_more_than_the_setting() -> None:
    chunks = Chunks(7)
    for _ in range(10):
        chunks.measured(0.001, {False: chunks.size(False), True: 0})
    assert chunks.size(False) == chunks.size(True) == 7
