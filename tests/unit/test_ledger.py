"""The ledger against runs that were made up second by second."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymodels.ledger import Account, Ledger, account

Event = dict[str, Any]


def started(time: float, resumed: int = 0, attempt: int = 1) -> Event:
    return {"time": time, "kind": "started", "attempt": attempt, "resumed_from_step": resumed, "steps": 100}


def report(time: float, done: int, /, **seconds: float) -> Event:
    return {"time": time, "kind": "report", "step": done, "world_size": 2, "seconds": seconds}


def at(time: float, kind: str, **more: Any) -> Event:
    return {"time": time, "kind": kind, **more}


def spent(found: Account) -> dict[str, float]:
    """The account without what is zero; first, that it is one."""
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
    assert sum(sum(interval.seconds.values()) for interval in found.intervals) == pytest.approx(found.wall, abs=1e-6)
    return {kind: pytest.approx(seconds) for kind, seconds in found.seconds.items() if abs(seconds) > 1e-9}


def test_a_healthy_run() -> None:
    found = account(
        [
            at(100, "prepared"),
            started(101),
            report(120, 1, scheduling=5, start=10, compile=4),
            report(130, 11, data=1, step=9),
            at(131, "saved", step=11, seconds=1.0, bytes=10),
            report(150, 21, step=10, evaluation=8, blocked_by_save=1.5, other=0.5),
            at(154, "finished"),
        ]
    )
    assert spent(found) == {
        "scheduling": 6,
        "start": 10,
        "compile": 4,
        "data": 1,
        "step": 19,
        "evaluation": 8,
        "blocked_by_save": 1.5,
        "other": 0.5,
        "ending": 4,
    }
    assert (found.wall, found.goodput, found.restarts, found.step) == (54, pytest.approx(19 / 54), 0, 21)
    assert found.finished and found.error == 0 and found.attempts[0].ending == "finished"


def test_work_that_is_done_again_is_lost_in_proportion() -> None:
    events = [
        started(0),
        report(10, 1, start=8, compile=2),
        report(20, 11, step=8, data=2),
        report(40, 21, step=10, evaluation=10),
        at(47, "failed", attempt=1, fault="out of memory", cause="rank 1 ran out of memory", retry=True),
        started(50, resumed=6, attempt=2),
        report(60, 7, start=9, compile=1),
    ]
    # Steps 7 to 11 are half of the first interval; of the second all is lost; 7 s came after the last report.
    found = account(events)
    assert spent(found) == {"start": 17, "compile": 3, "data": 1, "step": 4, "lost_to_rework": 5 + 20 + 7, "down": 3}
    assert found.attempts[0].cause == "out of memory: rank 1 ran out of memory"
    assert (found.attempts[1].down, found.step, found.restarts) == (3, 7, 1)


def test_a_later_attempt_can_fall_back_behind_an_earlier_one() -> None:
    found = account(
        [
            started(0),
            report(10, 10, step=10),
            at(10, "failed"),
            started(10, resumed=8, attempt=2),
            report(20, 13, step=10),
            at(20, "failed"),
            started(20, resumed=4, attempt=3),
            report(30, 14, step=10),
            at(30, "finished"),
        ]
    )
    assert spent(found) == {"step": 4 + 10, "lost_to_rework": 6 + 10}


def test_a_killed_driver_is_down_from_its_last_event_on() -> None:
    found = account(
        [
            started(0),
            report(10, 5, step=10),
            at(12, "saved", step=5, seconds=1.0, bytes=1),
            at(99, "notice", text="since the last start", driver=2),
            at(100, "prepared", driver=2),
            started(101, resumed=5, attempt=2) | {"driver": 2},
            report(111, 10, step=10) | {"driver": 2},
            at(111, "finished", driver=2),
        ]
    )
    assert spent(found) == {"step": 20, "lost_to_rework": 2, "down": 89}
    assert [attempt.ending for attempt in found.attempts] == ["killed", "finished"]
    assert "no record" in found.attempts[0].cause and found.attempts[1].cause == ""


def test_a_start_that_is_refused_is_not_the_end_of_the_attempt_before() -> None:
    events = [started(0), report(10, 5, step=10), at(100, "failed", error="ConfigError", driver=2)]
    found = account(events)
    assert spent(found) == {"step": 10, "unaccounted": 90} and found.attempts[0].ending == "killed"


def test_an_attempt_that_reports_nothing_is_lost() -> None:
    found = account([started(0), at(30, "failed", error="ClusterError", message="no room\nmore"), at(31, "notice")])
    assert spent(found) == {"lost_to_rework": 30, "unaccounted": 1}
    assert found.attempts[0].cause == "ClusterError: no room"


def test_a_resized_attempt_goes_on_from_a_checkpoint() -> None:
    found = account(
        [
            started(0),
            report(10, 10, step=10),
            at(13, "resized", **{"from": 4, "to": 2}, resumed_from_step=5),
            report(20, 6, scheduling=4, restore=2, compile=1),
            report(30, 11, step=10),
            at(30, "finished"),
        ]
    )
    expected = {"scheduling": 4, "restore": 2, "compile": 1, "step": 5 + 10, "lost_to_rework": 5 + 3}
    assert spent(found) == expected and found.restarts == 0


def test_a_resize_that_loses_nothing_changes_nothing() -> None:
    events = [started(0), report(10, 10, step=10), report(20, 20, step=10), at(20, "finished")]
    resized = [*events[:2], at(15, "resized", **{"from": 2, "to": 4}), *events[2:]]
    assert account(resized).seconds == account(events).seconds


def test_steps_that_come_again_unannounced_are_lost() -> None:
    found = account([started(0), report(10, 10, step=10), report(20, 6, step=10), at(20, "finished")])
    assert spent(found) == {"step": 5 + 10, "lost_to_rework": 5}


def test_what_the_clocks_disagree_on_is_unaccounted() -> None:
    found = account(
        [
            started(0),
            report(10, 5, step=9),  # one second late
            report(20, 10, step=10.5),  # half a second sooner after it
            at(20, "failed"),
            started(20, resumed=10, attempt=2),
            report(30, 15, step=11),  # more than there was
            at(30, "finished"),
        ]
    )
    assert spent(found) == {"step": 30.5, "unaccounted": -0.5}
    assert found.error == pytest.approx(0.5 + 1.0)  # the two attempts' differences do not cancel


def test_a_report_counts_from_when_it_was_made() -> None:
    late = [
        started(0),
        report(12, 5, step=10) | {"at": 10},
        report(21, 10, step=10) | {"at": 20},
        at(23, "failed"),
    ]
    found = account(late)
    assert spent(found) == {"step": 20, "lost_to_rework": 3} and found.error == 0


@pytest.mark.parametrize(("said", "step", "unaccounted"), [(-100, 10, -10), (100, 10, 0)])
def test_a_clock_far_off_is_held_to_the_drivers(said: float, step: float, unaccounted: float) -> None:
    found = account([started(0), report(10, 5, step=10) | {"at": said}, at(10, "finished")])
    assert found.seconds["step"] == step and found.seconds["unaccounted"] == unaccounted
    assert sum(found.seconds.values()) == pytest.approx(10)


def test_steps_that_were_committed_but_not_reported_count() -> None:
    events = [
        started(0),
        report(10, 10, step=5, evaluation=5),
        at(17, "failed"),
        started(17, resumed=14, attempt=2),
        report(20, 20, step=3),
        at(20, "failed"),
    ]
    assert spent(account(events)) == {"step": 5 + 4 * 0.5 + 3, "evaluation": 5, "lost_to_rework": 5}
    # An attempt that falls back into those steps does the rest of them again.
    again = [*events, started(20, resumed=12, attempt=3)]
    assert spent(account(again)) == {"step": 5 + 2 * 0.5, "evaluation": 5, "lost_to_rework": 5 + 1 + 3}


def test_committed_steps_take_no_more_than_there_was() -> None:
    events = [started(0), report(10, 10, step=10), at(12, "failed"), started(12, resumed=90, attempt=2)]
    assert spent(account(events)) == {"step": 12}


def test_reports_that_tell_no_seconds_leave_them_unaccounted() -> None:
    silent = {"time": 10, "kind": "report", "step": 1}
    found = account([started(0), silent, at(12, "finished")])
    assert spent(found) == {"ending": 2, "unaccounted": 10} and found.error == 10


def test_an_open_attempt_is_unaccounted_from_its_last_report_on() -> None:
    found = account([started(0), report(10, 1, start=10), at(13, "notice", text="a worker is slow")])
    assert spent(found) == {"start": 10, "unaccounted": 3} and not found.finished


def test_a_command_given_again_after_the_end_does_not_lengthen_the_run() -> None:
    events = [started(0), report(10, 100, step=10), at(11, "finished")]
    again = [*events, at(5000, "prepared"), at(5001, "finished")]
    assert account(again).seconds == account(events).seconds == {"step": 10, "ending": 1, "unaccounted": 0}


def test_what_is_published_after_a_failure_ends_the_run() -> None:
    events = [started(0), report(10, 100, step=10), at(11, "failed"), at(20, "prepared"), at(21, "finished")]
    assert spent(account(events)) == {"step": 10, "lost_to_rework": 1, "down": 10}


def test_a_clock_that_is_set_back_takes_no_time() -> None:
    found = account([started(50), report(60, 5, step=10), at(30, "notice"), report(65, 10, step=5), at(65, "finished")])
    assert spent(found) == {"step": 15} and found.wall == 15


def test_nothing_recorded_is_an_empty_account() -> None:
    found = account([])
    assert (found.wall, found.goodput, found.restarts, found.attempts) == (0, 0, 0, [])
    assert found.timeline(10) == []


def test_the_timeline_shows_what_took_most_of_each_stretch() -> None:
    events = [started(0), report(20, 1, start=15, compile=5), report(60, 11, data=4, step=36), at(60, "failed")]
    events += [started(80, resumed=11, attempt=2), report(99, 12, start=19), at(100, "finished")]
    expected = ["start", "start", "step", "step", "step", "step", "down", "down", "start", "start"]
    assert account(events).timeline(10) == expected


# --- A run made up second by second, against the plain truth about it -------------------------------------------------

seconds = st.floats(0, 100).map(lambda value: round(value, 3))
some = st.floats(0.01, 10).map(lambda value: round(value, 3))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Event], dict[str, float]]:
    """A run's events and, kept apart from them, what its time really went to."""
    now, step, number, driver = 1000.0, 0, 0, 1
    events, truth = (
        [at(now, "prepared", driver=1)],
        dict.fromkeys(("scheduling", "lost_to_rework", "down", "ending"), 0.0),
    )
    overheads = ("start", "restore", "compile")
    truth |= dict.fromkeys(overheads, 0.0)
    standing: dict[int, dict[str, float]] = {}  # step -> what its last execution took
    endings = [*draw(st.lists(st.sampled_from(["failed", "killed"]), max_size=5)), "finished"]
    for ending in endings:
        gap, number = draw(seconds), number + 1
        now += gap
        truth["down" if number > 1 else "scheduling"] += gap
        resumed = draw(st.integers(0, step))
        for done in [done for done in standing if done > resumed]:
            truth["lost_to_rework"] += sum(standing.pop(done).values())
        before = len(events)
        if number > 1 and (endings[number - 2] == "killed" or draw(st.booleans())):
            driver += 1
            events.append(at(now, "prepared"))
        events.append(started(now, resumed, number))
        step = resumed
        for length in draw(st.lists(st.integers(1, 7), min_size=1 if ending == "finished" else 0, max_size=5)):
            took: dict[str, float] = {}
            if step == resumed:
                took = {kind: draw(seconds) for kind in ("scheduling", *overheads)}
                for kind, value in took.items():
                    truth[kind] += value
            each = {kind: draw(some) for kind in ("data", "step", "evaluation", "blocked_by_save")}
            for _ in range(length):
                step += 1
                standing[step] = dict(each)
            took |= {kind: value * length for kind, value in each.items()}
            now += sum(took.values())
            events.append(report(now, step, **took))
        tail = draw(seconds)
        now += tail
        truth["ending" if ending == "finished" else "lost_to_rework"] += tail
        events.append(at(now, "saved" if ending == "killed" else ending))
        events[before:] = [event | {"driver": driver} for event in events[before:]]
    for each in standing.values():
        for kind, value in each.items():
            truth[kind] = truth.get(kind, 0.0) + value
    return events, truth


@given(histories())
def test_the_account_is_the_truth(history: tuple[list[Event], dict[str, float]]) -> None:
    events, truth = history
    found = account(events)
    assert found.wall == pytest.approx(events[-1]["time"] - events[0]["time"])
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    for kind, expected in truth.items():
        assert found.seconds.get(kind, 0.0) == pytest.approx(expected, abs=1e-6), kind
    assert found.restarts == sum(event["kind"] == "started" for event in events) - 1


@given(histories(), st.integers(1, 200))
def test_a_timeline_has_its_width(history: tuple[list[Event], dict[str, float]], columns: int) -> None:
    found = account(history[0])
    assert len(found.timeline(columns)) == (columns if found.wall else 0)


@given(histories(), st.data())
def test_the_account_sums_at_any_moment(history: tuple[list[Event], dict[str, float]], data: st.DataObject) -> None:
    """As the driver sees it, in the midst of a run, with reports that arrive late."""
    ledger, late = Ledger(), data.draw(st.floats(0, 0.3))
    for event in history[0]:
        ledger.add({**event, "time": event["time"] + (late if event["kind"] == "report" else 0.0)})
        found = ledger.account()
        assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
    assert found.error <= late * len(found.attempts) + 1e-6
