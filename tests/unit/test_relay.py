"""The way of the reports from Ray's controller to the driver."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from raymodels.train import relay as module
from raymodels.train.relay import Relay, fullest, relay


def report(step: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 2.5, "memory_bytes": rank} for rank in (7, 8)]


def test_all_reports_arrive_in_order() -> None:
    seen: list[dict[str, Any]] = []
    with relay(seen.append) as callback:
        for step in range(500):
            callback.after_report(None, report(step), None)
    assert seen == [{"step": step, "loss": 2.5, "memory_bytes": [7, 8]} for step in range(500)]


def test_a_report_arrives_while_training_goes_on() -> None:
    arrived = threading.Event()
    with relay(lambda _: arrived.set()) as callback:
        callback.after_report(None, report(1), None)
        assert arrived.wait(10)


def test_a_line_that_is_still_being_written_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    seen: list[dict[str, Any]] = []
    with relay(seen.append) as callback, callback._path.open("a") as file:
        for part in ('{"st', 'ep": 1', '}\n{"step"', ": 2}\n"):
            file.write(part)
            file.flush()
            time.sleep(0.05)
    assert seen == [{"step": 1}, {"step": 2}]


def test_reports_before_a_failure_arrive() -> None:
    seen: list[dict[str, Any]] = []
    with pytest.raises(ZeroDivisionError), relay(seen.append) as callback:
        callback.after_report(None, report(1), None)
        raise ZeroDivisionError
    assert [event["step"] for event in seen] == [1]


def test_what_a_listener_raises_is_not_swallowed() -> None:
    def fail(event: dict[str, Any]) -> None:
        raise KeyError(event["step"])

    with pytest.raises(KeyError, match="3"), relay(fail) as callback:
        callback.after_report(None, report(3), None)


def test_the_file_goes_with_the_context() -> None:
    with relay(lambda _: None) as callback:
        assert isinstance(callback, Relay) and callback._path.exists()
    assert not callback._path.exists()


def test_memory_of_many_ranks_is_told_by_groups() -> None:
    assert fullest([3, 1, 2]) == [3, 1, 2]
    assert fullest(list(range(64))) == list(range(64))
    many = fullest(list(range(8000)))
    assert len(many) == 64 and many[0] == 124 and max(many) == 7999
