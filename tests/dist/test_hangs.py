"""Real ranks over gloo that stand: named by rank, kind and stack. The whole set of faults is a benchmark."""

from __future__ import annotations

import random

import pytest
import torch

from tests.soak.hang_naming import KINDS, Plan, healthy, inject
from raymodels.train.verdict import Bounds

BOUNDS = Bounds(seconds=4.0)


@pytest.mark.parametrize(("fault", "function"), [("stop", None), ("skip weight", "backward"), ("read", "read_batch")])
def test_a_rank_that_stands_is_named_with_its_stack(fault: str, function: str | None) -> None:
    plan = Plan(2, fault=fault, rank=1, at=13)
    named, _, _ = inject(plan, random.Random(5), BOUNDS)
    assert named
    assert (named.verdict.rank, named.verdict.kind) == (1, KINDS[fault])
    assert named.right_stack
    assert "Program.train" in named.verdict.stack
    assert function is None or function in named.verdict.stack
    waits_in = named.verdict.others[0].split()[0]  # a stopped rank may miss any collective of a step
    assert waits_in in torch.distributed.distributed_c10d.__all__, named.verdict.others
    assert "Program." in named.verdict.others[0]


def test_the_one_of_three_that_missed_a_collective_is_named() -> None:
    named, _, _ = inject(Plan(3, fault="skip gradients", rank=2, at=13), random.Random(5), BOUNDS)
    assert named
    assert (named.verdict.rank, named.verdict.kind) == (2, KINDS["skip gradients"])


def test_neither_a_long_first_step_nor_an_evaluation_nor_a_save_is_an_alarm_and_a_slow_rank_is_told() -> None:
    plan = Plan(2, steps=101, rank=1, long_seconds=4.0, step_seconds=0.01, slow_seconds=0.03)
    alarms, slow = healthy(plan, BOUNDS)
    assert alarms == []
    assert [each.rank for each in slow] == [1]
    assert slow[0].ratio > 1.5
