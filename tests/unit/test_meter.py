"""Where a worker's seconds go: every one is counted once."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymodels.train import meter
from raymodels.train.heartbeat import Heart, read_beats
from raymodels.train.meter import KINDS, Meter, Phases


class Clock:
    """Time that passes when it is told to, in whole seconds, so that sums are exact."""

    now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_phase_within_a_phase_counts_for_the_inner_one_alone(clock: Clock) -> None:
    phases = Phases()
    with phases("step"):
        clock.sleep(2)
        with phases("data"):
            clock.sleep(5)
            with phases("evaluation"):
                clock.sleep(3)
        clock.sleep(2)
        with phases("data"):
            clock.sleep(1)
    assert phases.take() == {"step": 4, "data": 6, "evaluation": 3, "other": 0}


def test_what_no_phase_saw_is_other_and_so_is_reporting(clock: Clock) -> None:
    phases = Phases()
    for _ in range(3):
        with phases("step"):
            clock.sleep(1)
            with phases("data"):
                clock.sleep(1)
        clock.sleep(2)
    with phases("report"):
        clock.sleep(4)
    assert phases.take() == {"step": 3, "data": 3, "other": 10}


def test_every_reading_starts_where_the_one_before_ended(clock: Clock) -> None:
    phases = Phases()
    readings = []
    for name in ("data", "evaluation", "data"):
        clock.sleep(1)
        with phases(name):
            clock.sleep(2)
        readings.append(phases.take())
    assert readings == [{"data": 2, "other": 1}, {"evaluation": 2, "other": 1}, {"data": 2, "other": 1}]
    assert phases.take() == {"other": 0}


def test_seconds_before_the_worker_had_a_clock_are_added(clock: Clock) -> None:
    phases = Phases()
    phases.add("worker_start", 5.0)
    phases.add("imports", 2.0)
    with phases("model"):
        clock.sleep(1)
    clock.sleep(3)
    assert phases.take() == {"scheduling": 5, "start": 3, "other": 3}


def test_the_start_up_ends_with_the_first_step(clock: Clock) -> None:
    phases = Phases()
    phases.add("worker_start", 5.0)
    for name, seconds in (("data", 1), ("model", 2), ("engine", 3), ("restore", 4)):
        with phases(name):
            clock.sleep(seconds)
    phases.take()
    with phases("first_step"):
        clock.sleep(2)
        with phases("weigh"):
            clock.sleep(5)
    told = {"worker_start": 5, "imports": 0, "data": 1, "model": 2, "engine": 3, "restore": 4, "first_step": 7}
    assert phases.start_up() == told
    assert sum(told.values()) == clock.now - 100 + 5


def test_phases_of_one_kind_are_summed(clock: Clock) -> None:
    phases = Phases()
    for name, seconds in (("model", 3), ("engine", 2), ("weigh", 1), ("step", 2)):
        with phases(name):
            clock.sleep(seconds)
    assert KINDS["model"] == KINDS["engine"] == "start" and KINDS["weigh"] == "step"
    assert phases.take() == {"start": 5, "step": 3, "other": 0}


def test_a_phase_tells_its_seconds_with_those_of_the_inner_ones(clock: Clock) -> None:
    phases = Phases()
    with phases("blocked_by_save") as blocked:
        clock.sleep(1)
        with phases("data"):
            clock.sleep(2)
    assert blocked() == 3


def test_seconds_add_up_to_wall_time() -> None:
    before = time.perf_counter()
    phases, begun, taken = Phases(), time.perf_counter(), 0.0
    for number in range(200):
        with phases("step"), phases("data"):
            time.sleep(1e-4)
        if number % 50 == 0:
            taken += sum(phases.take().values())
    end = time.perf_counter()
    taken += sum(phases.take().values())
    assert end - begun <= taken + 1e-6 and taken - 1e-6 <= time.perf_counter() - before


def test_the_heart_hears_of_every_change(tmp_path: Path) -> None:
    phases = Phases(Heart(tmp_path, 0, 1))
    told = []

    def listen() -> None:
        [beat] = read_beats(tmp_path)
        told.append((beat.phase, beat.step))

    phases.step = 6
    with phases("engine"):
        listen()
    phases.step = 7
    with phases("first_step"):
        listen()
        with phases("data"):
            listen()
        listen()
    with phases("blocked_by_save"):
        listen()
    assert told == [("start", 6), ("step", 7), ("data", 7), ("step", 7), ("save", 7)]


def test_throughput_counts_timed_steps_alone(clock: Clock) -> None:
    throughput = Meter(flops_per_token=6.0)
    for tokens in (100, 300):
        with throughput.step() as timed:
            clock.sleep(2)
            timed.tokens = tokens
        clock.sleep(5)
    assert throughput.read() == {"step_seconds": 2, "tokens_per_second": 100, "model_flops_per_second": 600}
    with throughput.step() as timed:
        clock.sleep(1)
        timed.tokens = 1
    assert throughput.read() == {"step_seconds": 1, "tokens_per_second": 1, "model_flops_per_second": 6}
