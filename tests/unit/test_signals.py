"""What a worker hears when it is asked to leave for more than one reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raymodels.train import signals
from raymodels.train.signals import Reason, Signals


@pytest.mark.parametrize("reasons", [["resized", "terminated"], ["terminated", "replaced"], ["replaced", "resized"]])
def test_of_several_reasons_the_first_of_all_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[Reason]
) -> None:
    monkeypatch.setattr(signals, "POLL_SECONDS", 0.01)
    for reason in reasons:
        signals.request(str(tmp_path), 1, reason)
    ear = Signals(str(tmp_path), 1)
    ear._listener.start()
    deadline = time.monotonic() + 20
    while ear.heard() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ear._over.set()
    ear._listener.join()
    assert ear.heard() == min(reasons, key=signals.REASONS.index)


def test_who_was_replaced_saves_nothing_though_its_node_is_taken_back(tmp_path: Path) -> None:
    ear = Signals(str(tmp_path), 1, preempted=lambda: True)
    assert ear.heard() == "preempted"
    ear._heard.add("replaced")
    assert ear.heard() == "replaced"
