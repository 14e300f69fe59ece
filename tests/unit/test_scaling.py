"""The autoscaling policy inside Ray Serve: what replicas report, what Serve's context says, what Serve makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig as ServeAutoscalingConfig
from ray.serve.config import AutoscalingContext

from raymodels.config import AutoscalingConfig
from raymodels.serve.engine import EngineStats
from raymodels.serve.load import LoadMeter
from raymodels.serve.scaling import ServePolicy, StartUp, observation, serve_settings, undone, watched

DEPLOYMENT = DeploymentID(name="lm--v1", app_name="lm")
NOW = 5000.0


def context(running: int, target: int, **more: Any) -> AutoscalingContext:
    fields: dict[str, Any] = {
        "deployment_id": DEPLOYMENT,
        "deployment_name": DEPLOYMENT.name,
        "app_name": DEPLOYMENT.app_name,
        "current_num_replicas": running,
        "target_num_replicas": target,
        "running_replicas": [],
        "total_num_requests": 0.0,
        "total_queued_requests": 0.0,
        "aggregated_metrics": {},
        "raw_metrics": {},
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 100,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": NOW,
        "config": None,
    }
    return AutoscalingContext(**(fields | more))


def metrics(*reports: dict[str, float]) -> dict[str, dict[ReplicaID, list[TimeStampedValue]]]:
    """As Serve hands on what replicas report; an older value comes first."""
    names = {name for report in reports for name in report}
    ids = [ReplicaID(unique_id=str(number), deployment_id=DEPLOYMENT) for number in range(len(reports))]
    return {
        name: {
            id: [TimeStampedValue(NOW - 2, 99.0), TimeStampedValue(NOW - 1, report[name])]
            for id, report in zip(ids, reports, strict=True)
        }
        for name in names
    }


def test_serve_takes_the_settings_and_makes_the_policy() -> None:
    config = AutoscalingConfig(min_replicas=0, max_replicas=7, first_replicas=2, idle_s=11)
    with pytest.warns(DeprecationWarning, match="metrics_interval_s"):
        settings = ServeAutoscalingConfig(**serve_settings(config))
    policy = settings.policy.get_policy()(**settings.policy.policy_kwargs)
    assert policy._config == config
    assert (settings.min_replicas, settings.max_replicas) == (0, 7)
    assert settings.upscale_delay_s == settings.downscale_delay_s == settings.downscale_to_zero_delay_s == 0


@pytest.mark.parametrize("first", [1, 3])
def test_serve_does_what_the_policy_decides(first: int) -> None:
    """Through Serve's own wrapper: from zero, up, and down to zero again, within a few calls."""
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=100,
        first_replicas=first,
        upscale_delay_s=5,
        downscale_delay_s=20,
        idle_s=30,
        start_up_s=1,
        max_step_down=1,
    )
    settings = ServeAutoscalingConfig(**serve_settings(config))
    policy = _apply_autoscaling_config(ServePolicy(**settings.policy.policy_kwargs))
    target = 0
    state: dict[str, Any] = {}
    targets: list[int] = []
    for second in range(120):
        requests = 0.0 if second < 10 else 64.0 if second < 60 else 0.0
        running = targets[-3] if len(targets) > 2 else 0  # what was ordered answers two seconds later
        seen = context(
            min(running, target),
            target,
            total_num_requests=requests,
            current_time=NOW + second,
            policy_state=dict(state),
            config=settings,
        )
        target, state = policy(seen)
        assert target == int(target)
        targets.append(int(target))
    assert targets[9] == 0
    assert targets[10] == first, "the first request orders first_replicas"
    assert targets[59] == 8, "64 requests at 8 to a replica"
    assert targets[-1] == 0
    assert min(targets[60:85]) >= 1
    assert "start_up" in state


@given(st.integers(0, 500), st.integers(0, 2000), st.integers(1, 50))
def test_serves_factor_is_divided_out_again(running: int, wanted: int, factor: int) -> None:
    config = ServeAutoscalingConfig(upscaling_factor=factor, max_replicas=10_000)
    assert _apply_scaling_factors(undone(wanted, running, factor), running, config) == wanted


def test_what_replicas_report_is_summed_up() -> None:
    first = {
        "load_running": 8.0,
        "load_queued": 4.0,
        "load_held": 10.0,
        "load_held_tokens": 5000.0,
        "load_requests_per_s": 2.0,
        "load_tokens_per_request": 100.0,
        "load_full_tokens_per_s": 300.0,
        "load_ttft_p95_s": 0.5,
    }
    second = dict.fromkeys(first, 0.0) | {"load_requests_per_s": 1.0, "load_ttft_p95_s": 0.25}
    reports = metrics(first, second)
    seen = observation(
        context(2, 5, raw_metrics=reports, total_num_requests=15.0, total_queued_requests=3.0),
        42.0,
    )
    assert (seen.now, seen.replicas, seen.starting, seen.start_up_s) == (NOW, 2, 3, 42.0)
    assert (seen.running, seen.queued) == (8.0, 17.0)
    assert seen.queued_tokens == 7 * 100 + 5000
    assert seen.arriving_tokens_per_s == 300
    assert seen.replica_tokens_per_s == 300, "a replica that was never full does not know what it serves"
    assert seen.ttft_p95_s == 0.5
    sent = observation(context(2, 5, raw_metrics=reports, total_num_requests=12.0, total_queued_requests=3.0), 42.0)
    assert sent.queued == 14.0, "the three that Serve still has as unsent are counted twice"


def test_without_reports_serves_own_count_is_what_there_is() -> None:
    seen = observation(context(1, 1, total_num_requests=9.5, total_queued_requests=2.0), 0.0)
    assert (seen.running, seen.queued, seen.replica_tokens_per_s) == (7.5, 2.0, 0.0)


def test_the_start_up_time_is_measured() -> None:
    known = StartUp(0.0, None, 0, NOW)
    # Ordered by Serve's cold start, of which the policy hears only when the replica answers.
    known = watched(context(1, 1, last_scale_up_time=NOW + 5, current_time=NOW + 35), known)
    assert known.seconds == 30
    known = watched(context(1, 3, last_scale_up_time=NOW + 40, current_time=NOW + 41), known)
    known = watched(context(1, 4, last_scale_up_time=NOW + 50, current_time=NOW + 51), known)
    known = watched(context(2, 4, last_scale_up_time=NOW + 50, current_time=NOW + 60), known)
    assert known.seconds == 20, "from the first of two orders"
    known = watched(context(4, 4, last_scale_up_time=NOW + 50, current_time=NOW + 70), known)
    assert (known.seconds, known.since) == (20, None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_replica_measures_its_load() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    tokens = 0
    for second in range(1, 61):
        clock.now = float(second)
        meter.arrived(3)
        meter.first_token(0.1 * second)
        meter.left(2)
        tokens += 200
        report = meter.report(EngineStats(running=8, queued=second, tokens_in=tokens // 2, tokens_out=tokens // 2))
    assert report["load_requests_per_s"] == pytest.approx(3)
    assert report["load_tokens_per_request"] == pytest.approx(100)
    assert report["load_full_tokens_per_s"] == pytest.approx(200)
    assert report["load_ttft_p95_s"] == pytest.approx(5.9), "of the last 30 s"
    assert (report["load_running"], report["load_queued"]) == (8, 60)


def test_a_replica_that_was_never_full_does_not_say_what_it_serves() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    for second in range(1, 10):
        clock.now = float(second)
        report = meter.report(EngineStats(running=1, queued=0, tokens_in=second * 10, tokens_out=0))
    assert report["load_full_tokens_per_s"] == 0
    assert report["load_tokens_per_request"] == 0


def test_what_gateways_hold_back_is_forgotten_once_it_is_old() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    meter.held(5, 700)
    clock.now = 29.0
    report = meter.report(EngineStats(0, 0, 0, 0))
    assert (report["load_held"], report["load_held_tokens"]) == (5, 700)
    clock.now = 31.0
    assert meter.report(EngineStats(0, 0, 0, 0))["load_held"] == 0
