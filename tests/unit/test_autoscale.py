"""The autoscaling policy: what must hold for every observation, and each of its rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymodels.config import AutoscalingConfig, ServeConfig, validate
from raymodels.errors import ConfigError
from raymodels.serve.autoscale import Decision, Observation, State, decide, needed

NOW = 10_000.0
LOAD = ("running", "queued", "queued_tokens", "arriving_tokens_per_s", "ttft_p95_s")

amounts = st.one_of(st.just(0.0), st.floats(0, 1e6))
times = st.one_of(st.none(), st.floats(0, NOW))
observations = st.builds(
    Observation,
    now=st.just(NOW),
    replicas=st.integers(0, 2000),
    starting=st.integers(0, 200),
    running=amounts,
    queued=amounts,
    queued_tokens=amounts,
    arriving_tokens_per_s=amounts,
    replica_tokens_per_s=st.one_of(st.just(0.0), st.floats(1, 1e4)),
    ttft_p95_s=st.floats(0, 100),
    start_up_s=st.floats(0, 600),
)
states = st.one_of(
    st.builds(State, busy_at=times),
    st.builds(State, busy_at=times, more_since=st.floats(0, NOW)),
    st.builds(State, busy_at=times, fewer_since=st.floats(0, NOW), enough=st.integers(0, 3000)),
)


@st.composite
def configs(draw: st.DrawFn) -> AutoscalingConfig:
    least = draw(st.integers(0, 50))
    most = draw(st.integers(max(1, least), 3000))
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        first_replicas=draw(st.integers(1, most)),
        target_ongoing_requests=draw(st.floats(0.1, 100)),
        target_load=draw(st.floats(0.1, 1)),
        target_ttft_s=draw(st.one_of(st.none(), st.floats(0.1, 10))),
        drain_s=draw(st.floats(1, 100)),
        dead_band=draw(st.floats(0, 0.5)),
        max_step_up=draw(st.floats(0.01, 10)),
        max_step_down=draw(st.floats(0.01, 1)),
        upscale_delay_s=draw(st.floats(0, 100)),
        downscale_delay_s=draw(st.floats(0, 1000)),
        idle_s=draw(st.floats(0, 1000)),
    )


@given(observations, states, configs())
def test_never_below_the_minimum_or_above_the_maximum(
    seen: Observation, state: State, config: AutoscalingConfig
) -> None:
    decision = decide(seen, state, config)
    assert config.min_replicas <= decision.replicas <= config.max_replicas
    assert decision.reason
    assert decision == decide(seen, state, config), "the same is decided differently"


@given(observations, states, configs(), st.tuples(*[amounts] * len(LOAD)))
def test_more_load_never_gets_fewer_replicas(
    seen: Observation, state: State, config: AutoscalingConfig, more: tuple[float, ...]
) -> None:
    busier = replace(seen, **{name: getattr(seen, name) + extra for name, extra in zip(LOAD, more, strict=True)})
    assert decide(busier, state, config).replicas >= decide(seen, state, config).replicas


@given(observations, states, configs())
def test_steps_are_bounded(seen: Observation, state: State, config: AutoscalingConfig) -> None:
    there, decision = seen.replicas + seen.starting, decide(seen, state, config)
    if decision.rule in ("from zero", "to zero", "bounds"):
        return
    assert decision.replicas <= there + max(1, int(there * config.max_step_up))
    assert decision.replicas >= there - max(1, int(there * config.max_step_down))


@given(observations, configs(), st.floats(0, 1))
def test_nothing_changes_in_the_dead_band(seen: Observation, config: AutoscalingConfig, place: float) -> None:
    there = min(max(seen.replicas, 1, config.min_replicas), config.max_replicas)
    edge = there / (1 + config.dead_band)
    requests = (edge + place * (there - edge)) * config.target_ongoing_requests * (1 - 1e-9)
    seen = Observation(now=NOW, replicas=there, starting=0, running=requests)
    for since in (State(more_since=0.0), State(fewer_since=0.0)):
        decision = decide(seen, since, config)
        # Rounding to whole replicas may ask for one more than the band reaches.
        assert (decision.replicas, decision.rule) == (there, "keep")
        assert decision.state.more_since is decision.state.fewer_since is None


@given(observations, states, configs())
def test_to_zero_only_when_nothing_is_there_to_do(seen: Observation, state: State, config: AutoscalingConfig) -> None:
    decision = decide(seen, state, config)
    if decision.replicas == 0 < seen.replicas + seen.starting:
        assert config.min_replicas == 0
        assert seen.running == seen.queued == 0
        assert state.busy_at is not None or config.idle_s == 0
        assert seen.now - (state.busy_at if state.busy_at is not None else seen.now) >= config.idle_s


def config(**settings: Any) -> AutoscalingConfig:
    return AutoscalingConfig(**{"min_replicas": 0, "max_replicas": 100, **settings})


def look(replicas: int, now: float = NOW, starting: int = 0, **load: Any) -> Observation:
    return Observation(now=now, replicas=replicas, starting=starting, **load)


def run(seen: Observation, settings: AutoscalingConfig, seconds: int, state: State | None = None) -> list[Decision]:
    """The decisions of so many seconds in which everything stays as it is but the clock."""
    decisions = []
    for second in range(seconds):
        decisions.append(decide(replace(seen, now=seen.now + second), state or State(), settings))
        state = decisions[-1].state
    return decisions


def test_from_zero_at_once() -> None:
    decision = decide(look(0, queued=1), State(), config(upscale_delay_s=100, first_replicas=3))
    assert (decision.replicas, decision.rule) == (3, "from zero")
    assert "requests wait: 1" in decision.reason


def test_no_replica_is_ordered_twice_while_the_first_starts() -> None:
    decisions = run(look(0, starting=1, queued=500, queued_tokens=1e6), config(), 100)
    assert {decision.replicas for decision in decisions} == {1}
    assert "starting" in decisions[0].reason


def test_to_zero_after_idling() -> None:
    decisions = run(look(2), config(idle_s=50, downscale_delay_s=1000), 51)
    assert [decision.replicas for decision in decisions] == [2] * 50 + [0]
    assert "no request for 50 s" in decisions[-1].reason


def test_one_replica_stays_while_anything_runs() -> None:
    decisions = run(look(4, running=1), config(idle_s=1, downscale_delay_s=5, max_step_down=1), 100)
    assert min(decision.replicas for decision in decisions) == 1


def test_a_minimum_is_never_idled_away() -> None:
    assert {d.replicas for d in run(look(1), config(min_replicas=1, idle_s=1, downscale_delay_s=1), 10)} == {1}


def test_up_after_the_delay_and_only_without_a_break() -> None:
    settings = config(upscale_delay_s=10, target_ongoing_requests=8)
    busy, calm = look(2, running=30), look(2, running=10)
    assert [d.replicas for d in run(busy, settings, 11)] == [2] * 10 + [4]
    state = run(busy, settings, 10)[-1].state
    assert state.more_since == NOW
    broken = decide(replace(calm, now=NOW + 10), state, settings)
    assert [d.replicas for d in run(replace(busy, now=NOW + 11), settings, 10, broken.state)] == [2] * 10


def test_down_to_the_most_that_was_needed_meanwhile() -> None:
    settings = config(downscale_delay_s=60, target_ongoing_requests=1, dead_band=0, max_step_down=1)
    state = State()
    for second in range(61):
        running = 7 if second == 30 else 2
        decision = decide(look(10, now=NOW + second, running=running, start_up_s=1), state, settings)
        state = decision.state
    assert (decision.replicas, decision.rule) == (7, "spare")


def test_what_takes_long_to_start_is_not_let_go_sooner() -> None:
    settings = config(downscale_delay_s=10, idle_s=1e6)
    decisions = run(look(4, running=1, start_up_s=90), settings, 91)
    assert [d.replicas for d in decisions] == [4] * 90 + [2]


def test_what_is_starting_is_not_ordered_again() -> None:
    # 1000 tokens/s arrive at one replica of 100: 13 are needed for them, and more for those that come meanwhile.
    settings = config(upscale_delay_s=0, max_step_up=100, drain_s=30)
    load: dict[str, Any] = {
        "queued": 10.0,
        "arriving_tokens_per_s": 1000.0,
        "replica_tokens_per_s": 100.0,
        "start_up_s": 60.0,
    }
    first = decide(look(1, queued_tokens=1000.0, **load), State(), settings)
    assert first.rule == "tokens"
    # A minute later 54,000 more tokens wait, the replicas that will take them are about to answer, and that is enough.
    later = look(1, now=NOW + 60, starting=first.replicas - 1, queued_tokens=55_000.0, **load)
    assert decide(later, first.state, settings).replicas == first.replicas


def test_a_longer_start_up_orders_more_at_once() -> None:
    load: dict[str, Any] = {"queued": 10.0, "arriving_tokens_per_s": 1000.0, "replica_tokens_per_s": 100.0}
    quick, slow = (needed(look(5, start_up_s=seconds, **load), config()) for seconds in (10.0, 100.0))
    assert slow.replicas > quick.replicas


def test_a_queue_calls_for_more_where_first_tokens_are_late() -> None:
    settings = config(target_ttft_s=1.0, upscale_delay_s=0)
    late = look(4, running=4, queued=1, ttft_p95_s=1.9)
    assert decide(late, State(), settings)[:2] == (8, "time to first token")
    assert decide(replace(late, queued=0), State(), settings).rule == "keep"
    assert decide(replace(late, starting=1), State(), settings).rule == "keep"
    assert decide(late, State(), config(upscale_delay_s=0)).rule == "keep"


def test_until_it_is_known_what_a_replica_serves_a_queue_counts_as_requests() -> None:
    known = look(1, running=8, queued=80, queued_tokens=100, replica_tokens_per_s=1000)
    assert needed(known, config()).replicas == 1
    assert needed(replace(known, replica_tokens_per_s=0), config()).replicas == 11


def test_bounds_that_were_changed_hold_at_once() -> None:
    assert decide(look(1), State(), config(min_replicas=3))[:2] == (3, "bounds")
    assert decide(look(9, running=99), State(), config(max_replicas=5))[:2] == (5, "bounds")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_replicas 2"),
        ({"first_replicas": 2}, "first_replicas 2 is more than max_replicas 1"),
        ({"target_load": 1.5}, "target_load"),
        ({"idle_seconds": 5}, "idle_s"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate({"models": [{"model": "lm", "autoscaling": wrong}]}, ServeConfig)
