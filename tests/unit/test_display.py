"""What a person sees of a run in a pipe."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from raymodels.display import duration, following

PREPARED = {"kind": "prepared", "reused": False, "train_tokens": 1234567, "place": "prepared/abc"}


def report(step: int, **more: Any) -> dict[str, Any]:
    figures = {"loss": 2.34567, "tokens_per_second": 12345.6, "model_flops_per_second": 9.5e11}
    return {"kind": "report", "step": step, "memory_bytes": [2**29, 3 * 2**29], **figures, **more}


def lines(events: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], steps: int = 40) -> list[str]:
    with following(steps) as on_event:
        for event in events:
            on_event(event)
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 30 s after the one before."""
    ticks = itertools.count(0, 30)
    monkeypatch.setattr("raymodels.display.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def test_a_run_in_lines(capsys: pytest.CaptureFixture[str], clock: None) -> None:
    events = [
        PREPARED,
        {"kind": "started", "resumed_from_step": 0, "steps": 40},
        report(10),
        report(20),
        report(30, eval_loss=2.5),
        {"kind": "notice", "text": "checkpoint kept"},
        report(40),
        {"kind": "finished"},
    ]
    figures = "12,346 tokens/s  0.950 TFLOP/s  1.5 GiB/rank"
    assert lines(events, capsys) == [
        "prepared 1,234,567 training tokens in prepared/abc",
        "starting 40 steps",
        f"step 10/40  loss 2.3457  {figures}",
        f"step 20/40  loss 2.3457  {figures}  1:00 left",
        f"step 30/40  loss 2.3457  held-out 2.5000  {figures}  0:30 left",
        "checkpoint kept",
        f"step 40/40  loss 2.3457  {figures}",
    ]


def test_a_restart_begins_the_estimate_anew(capsys: pytest.CaptureFixture[str], clock: None) -> None:
    started = {"kind": "started", "resumed_from_step": 10, "steps": 40}
    shown = lines([report(20), report(30), started, report(11), report(20)], capsys)
    assert shown[2] == "resuming after step 10 of 40"
    assert [line.partition("GiB/rank")[2] for line in shown] == ["", "  0:30 left", "", "", "  1:07 left"]


def test_preparing_takes_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    events = [{"kind": "preparing", "done": done, "total": 200} for done in range(201)]
    assert lines(events, capsys) == [f"preparing {done}/200" for done in range(0, 201, 20)]


def test_nothing_to_prepare(capsys: pytest.CaptureFixture[str]) -> None:
    reused = PREPARED | {"reused": True}
    assert lines([{"kind": "preparing", "done": 0, "total": 0}, reused], capsys) == [
        "preparing 0/0",
        "re-using 1,234,567 training tokens in prepared/abc",
    ]


def test_what_says_nothing_to_a_person_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines([{"kind": "report", "step": 3, "memory_bytes": [0]}, {"kind": "unheard"}], capsys) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (5.4, "0:05"),
        (59.7, "1:00"),
        (90061, "25:01:01"),
        (3599.4, "59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
