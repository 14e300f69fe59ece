"""When a run saves: by steps, by the clock, or as often as pays."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymodels.train.interval import AUTO_FIRST_S, AUTO_MOST_S, AUTO_OVERHEAD, Interval


def auto(world_size: int = 8, failures: int = 0, seconds: float = 0.0) -> Interval:
    return Interval("auto", world_size, failures, seconds, now=0.0)


def after_a_save(interval: Interval, blocked_s: float, writing_s: float = 0.0) -> float:
    interval.saved(0.0, blocked_s)
    interval.written(writing_s)
    return interval.seconds()


def test_steps_are_counted() -> None:
    interval = Interval(3, 2, 0, 0.0, now=0.0)
    assert [done for done in range(1, 10) if interval.due(done, now=1e9 * done)] == [3, 6, 9]


@pytest.mark.parametrize(("every", "seconds"), [("90s", 90), ("10m", 600), ("1.5m", 90), ("2h", 7200), ("0.5s", 0.5)])
def test_time_is_counted_from_the_save_before(every: str, seconds: float) -> None:
    interval = Interval(every, 2, 0, 0.0, now=1000.0)
    assert not interval.due(1, 1000 + seconds - 0.01)
    assert interval.due(2, 1000 + seconds)
    interval.saved(1000 + seconds + 5, blocked_s=3.0)
    assert not interval.due(3, 1000 + 2 * seconds + 4.99)
    assert interval.due(3, 1000 + 2 * seconds + 5)


def test_auto_saves_soon_once_to_learn_what_it_costs() -> None:
    interval = auto()
    assert not interval.due(1, AUTO_FIRST_S - 0.01)
    assert interval.due(1, AUTO_FIRST_S)


def test_auto_is_youngs_and_dalys_optimum() -> None:
    # 1,000 s between failures and 2 s for a save: sqrt(2 x 2 x 1,000) = 63.2 s.
    interval = auto(world_size=10**12, failures=1, seconds=2000.0)
    assert after_a_save(interval, blocked_s=2.0) == pytest.approx(math.sqrt(4000), rel=1e-3)


def test_without_failures_it_assumes_those_of_other_runs() -> None:
    # 16,384 workers expect a failure every 3.09 hours, so saves that stop them for 1 s are sqrt(2 x 11,135 s) apart.
    assert after_a_save(auto(world_size=16_384), blocked_s=1.0) == pytest.approx(149.2, abs=0.1)


def test_failures_make_saves_more_frequent() -> None:
    found = [after_a_save(auto(64, failures, 3600.0), blocked_s=0.1) for failures in (0, 20, 200, 20_000)]
    assert found == sorted(found, reverse=True) and found[0] > 5 * found[-1]


@given(
    world_size=st.integers(1, 10**6),
    failures=st.integers(0, 10**4),
    seconds=st.floats(0, 1e7),
    blocked_s=st.floats(1e-4, 1e4),
    writing_s=st.floats(0, 1e5),
)
def test_auto_costs_no_more_than_its_bound_and_never_starts_before_the_last_is_written(
    world_size: int, failures: int, seconds: float, blocked_s: float, writing_s: float
) -> None:
    interval = after_a_save(auto(world_size, failures, seconds), blocked_s, writing_s)
    assert blocked_s <= AUTO_OVERHEAD * interval * (1 + 1e-9)
    assert interval >= writing_s
    assert interval <= max(AUTO_MOST_S, blocked_s / AUTO_OVERHEAD, writing_s)


def test_the_dearest_save_seen_counts() -> None:
    interval = auto(world_size=16_384)
    dear = after_a_save(interval, blocked_s=2.0)
    assert after_a_save(interval, blocked_s=0.1) == dear
