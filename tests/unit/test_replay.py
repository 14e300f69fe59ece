"""Replays of the autoscaling policy: traces, the model they run on, and a small simulation of every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymodels.cli import main
from raymodels.config import AutoscalingConfig
from raymodels.errors import ConfigError, DataError
from raymodels.serve.replay import Fleet, Replay, picture, replay
from raymodels.serve.traces import SHAPES, Trace, read, synthetic

FLEET = Fleet(slots=8, max_queue=64, request_tokens_per_s=50, replica_tokens_per_s=200, start_up_s=30)


def steady(seconds: int, requests: int, tokens: float = 100) -> Trace:
    return Trace("steady", np.full(seconds, requests), np.full(seconds, tokens / 2), np.full(seconds, tokens / 2))


def config(**fields: Any) -> AutoscalingConfig:
    return AutoscalingConfig(**{"min_replicas": 0, "max_replicas": 50, "target_ongoing_requests": 6, **fields})


def balanced(result: Replay) -> bool:
    requests = int(result.trace.requests.sum())
    return requests == result.served + int(result.refused.sum()) + result.unfinished


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=300),
    st.integers(0, 3),
    st.integers(3, 20),
    st.integers(1, 64),
    st.integers(0, 40),
)
def test_no_request_is_lost_and_no_bound_is_broken(
    arrivals: list[int], least: int, most: int, max_queue: int, start_up_s: int
) -> None:
    fleet = Fleet(slots=4, max_queue=max_queue, start_up_s=start_up_s)
    trace = Trace("drawn", np.array(arrivals), np.full(len(arrivals), 30.0), np.full(len(arrivals), 20.0))
    result = replay(trace, config(min_replicas=least, max_replicas=most, downscale_delay_s=20, idle_s=20), fleet)
    assert balanced(result)
    assert result.ordered.min() >= least
    assert result.ordered.max() <= most
    assert (result.replicas <= result.ordered).all()
    assert sum(result.waits.values()) <= result.trace.requests.sum() - result.refused.sum()
    # What was there when a request came bounds the queue; replicas may be let go after that.
    assert result.queued.max() <= max_queue * max(1, int(result.replicas.max()))


def test_what_one_replica_serves_is_what_its_figures_say() -> None:
    """200 tokens/s are 2 requests of 100 tokens each second: at 2 nobody waits, at 3 a third is too much."""
    fixed = config(min_replicas=1, max_replicas=1)
    calm, busy = replay(steady(600, 2), fixed, FLEET), replay(steady(600, 3), fixed, FLEET)
    assert calm.wait(0.99) == 0
    assert calm.served == pytest.approx(1200, abs=20)
    assert busy.served == pytest.approx(1200, abs=20)
    assert busy.refused.sum() == pytest.approx(600 - 64, abs=20)
    assert busy.queued[-1] == pytest.approx(64, abs=4)
    assert busy.wait(0.5) == pytest.approx(64 / 2, rel=0.2)  # Little's law


@pytest.mark.parametrize("requests", [1, 5, 16, 40])
def test_a_steady_load_reverses_at_most_once_and_is_served(requests: int) -> None:
    result = replay(steady(3600, requests), config(), FLEET)
    assert result.reversals <= 1
    late = slice(1800, None)
    assert result.queued[late].max() == 0
    assert np.ptp(result.ordered[late]) == 0, "replicas still change after half an hour of the same load"
    assert result.ordered[-1] * FLEET.replica_tokens_per_s >= requests * 100


def test_step_from_zero_to_zero() -> None:
    roomy = replace(FLEET, max_queue=256)
    result = replay(synthetic("step", 1, 4, 50, 50, seed=1), config(idle_s=120, downscale_delay_s=120), roomy)
    begin, end = 360, 2400
    first = result.changes[0]
    assert (first.before, first.decision.replicas, first.decision.rule) == (0, 1, "from zero")
    assert first.second - begin <= 5
    assert result.refused.sum() == 0, "a request that was held for the first replica was refused"
    assert result.served == result.trace.requests.sum()
    assert result.ordered[:begin].max() == 0
    assert result.ordered[-1] == 0
    assert result.changes[-1].decision.rule == "to zero"
    assert result.changes[-1].second >= end + 120
    assert result.reversals <= 1


def test_bursts_are_met_and_let_go() -> None:
    result = replay(synthetic("bursts", 4, 30, 50, 50, seed=2), config(), FLEET)
    assert balanced(result)
    assert result.ordered.max() > 4 * np.median(result.ordered)
    assert result.wait(0.99) < 4 * FLEET.start_up_s
    assert len(result.changes) < 100


def test_a_day_is_followed() -> None:
    result = replay(synthetic("diurnal", 24, 40, 50, 50, seed=3), config(), FLEET)
    assert balanced(result)
    quiet, busy = result.ordered[4 * 3600], result.ordered[16 * 3600]
    assert busy > 4 * quiet
    assert result.wait(0.95) == 0
    assert result.reversals < 12


def test_of_those_let_go_the_ones_that_start_go_first() -> None:
    """A load that is gone before anything was ready: the replicas that answer never go below what runs."""
    trace = steady(200, 0)
    trace.requests[:20] = 10
    result = replay(trace, config(min_replicas=1, downscale_delay_s=30, max_step_down=1), Fleet(start_up_s=30))
    assert result.ordered.max() > 1
    assert result.ordered[-1] == 1
    assert result.served == 200


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_makes_a_trace(shape: str) -> None:
    first, again, other = (synthetic(shape, 0.5, 20, 100, 50, seed) for seed in (1, 1, 2))
    assert (first.requests == again.requests).all()
    assert (first.requests != other.requests).any()
    assert len(first.requests) == 1800
    assert first.requests.max() < 60
    assert first.prompt_tokens.mean() == pytest.approx(100, rel=0.05)


def test_a_recorded_trace(tmp_path: Path) -> None:
    lines = [
        {"time": 1002.9, "prompt_tokens": 30, "completion_tokens": 4, "status": 200},
        {"time": 1000.5, "prompt_tokens": 10, "completion_tokens": 2},
        {"time": 1003.4, "prompt_tokens": 60, "completion_tokens": 7, "requests": 2},
    ]
    file = tmp_path / "monday.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = read(file)
    assert trace.name == "monday"
    assert trace.requests.tolist() == [1, 0, 3]
    assert trace.prompt_tokens.tolist() == [10, 0, 50]
    assert trace.completion_tokens.tolist() == [2, 0, 6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no requests"),
        ("{", "t.jsonl:1 is no JSON"),
        ("[1]", "t.jsonl:1 is no JSON object"),
        ('{"time": 1, "prompt_tokens": 1}', "completion_tokens must be a number from 0, not null"),
        ('{"time": 1, "prompt_tokens": -1, "completion_tokens": 1}', "prompt_tokens must be a number from 0, not -1"),
        ('{"time": NaN, "prompt_tokens": 1, "completion_tokens": 1}', "time must be a number"),
        (
            "\n".join(f'{{"time": {t}, "prompt_tokens": 1, "completion_tokens": 1}}' for t in (0, 1763812345000)),
            "are all times in seconds",
        ),
    ],
)
def test_a_damaged_trace_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        read(file)


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bursts, diurnal, step"):
        read(tmp_path)


def test_pictures(tmp_path: Path) -> None:
    result = replay(steady(60, 1), config(), FLEET)
    picture(result, tmp_path / "steady.png")
    assert (tmp_path / "steady.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--out"):
        picture(result, tmp_path / "steady.nothing")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve.yaml").write_text(
        "models: [{model: a, autoscaling: {max_replicas: 7, min_replicas: 2}}, {model: b}]"
    )

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["raymodels", "autoscale", "replay", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, printed, _ = call("step", "--hours", "0.5", "--peak-rate", "50", "--config", "serve.yaml", "--model", "a")
    assert code == 0
    assert "replica_hours" in printed
    assert "2 -> 4" in printed
    assert (tmp_path / "replay-step.png").exists()
    code, printed, _ = call("bursts", "--hours", "0.5", "--out", "b.svg", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["requests"] == found["served"] + found["refused"] + found["unfinished"]
    assert all(change["reason"] for change in found["changes"])
    assert (tmp_path / "b.svg").exists()
    for wrong, said in [
        (["step", "--config", "serve.yaml"], "choose one with --model"),
        (["step", "--config", "serve.yaml", "--model", "c"], "the config serves a, b"),
        (["step", "--model", "a"], "need --config"),
        (["step", "--max-replicas", "0"], "max_replicas"),
        (["nothing.jsonl"], "cannot read the trace"),
    ]:
        code, _, error = call(*wrong)
        assert (code, said in error) == (2, True), error
