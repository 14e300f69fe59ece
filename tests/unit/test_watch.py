"""Marks, ages and medians of real files; and the judgement, as a table of situations that it must tell apart."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymodels.train.heartbeat import RECENT, Beat, Heart, process, read_beats
from raymodels.train.stacks import Stack, dump, read
from raymodels.train.verdict import (
    SKIPPED,
    STOPPED,
    STUCK,
    UNDECIDED,
    UNREACHABLE,
    Bounds,
    Verdict,
    accuse,
    median_step,
    overdue,
    slow_ranks,
)
from raymodels.train.watch import Monitor, Sentry

pytestmark = pytest.mark.slow

WAITING = Stack(("all_reduce (distributed_c10d.py:1)", "weigh (loop.py:7)"), waits=True)
BUSY = Stack(("tokenize (mine.py:3)", "train (loop.py:5)"))
COMPILING = Stack(("compile (torch/_inductor/x.py:1)",), compiles=True)
BOUNDS = Bounds()


def beat(rank: int, phase: str = "step", step: int = 40, **other: Any) -> Beat:
    """One of three ranks, at steps of a second, fresh unless told otherwise."""
    known: dict[str, Any] = {
        "host": "here",
        "node": "n",
        "world_size": 3,
        "pid": 1000 + rank,
        "thread": 1000 + rank,
        "born": 0.0,
        "within": 0,
        "marks": 100,
        "quiet": 0.1,
        "silent": 0.1,
        "status": "sleeping",
        "seconds": (1.0,) * RECENT,
        "own": (0.5,) * RECENT,
        "longest": {},
    }
    return Beat(rank=rank, phase=phase, step=step, **{**known, **other})


def three(*changes: dict[str, Any]) -> list[Beat]:
    return [beat(rank, **change) for rank, change in enumerate(changes)]


QUIET = {"quiet": 9.0}


@pytest.mark.parametrize(
    ("beats", "stacks", "rank", "kind"),
    [
        pytest.param(
            three(QUIET, {**QUIET, "silent": 9.0, "status": "stopped"}, QUIET), "WWW", 1, STOPPED, id="stopped"
        ),
        pytest.param(
            three(
                {"phase": "evaluation"},
                {**QUIET, "phase": "evaluation", "silent": 9.0, "status": "stopped"},
                {"phase": "save"},
            ),
            "BBB",
            1,
            STOPPED,
            id="stopped in evaluation, others at work",
        ),
        pytest.param(
            three(QUIET, {**QUIET, "silent": 6.0, "status": "stopped"}, QUIET), "WWW", 1, STOPPED, id="just stopped"
        ),
        pytest.param(three({**QUIET, "phase": "data"}, QUIET, QUIET), "BBB", 0, STUCK, id="no stack tells"),
        pytest.param(
            [beat(0, "data", world_size=2, **QUIET), beat(1, world_size=2, **QUIET)], "BB", 0, STUCK, id="two"
        ),
        pytest.param(three(QUIET, QUIET, QUIET), "WBW", 1, STUCK, id="busy where the others wait"),
        pytest.param(three(QUIET, {**QUIET, "phase": "data"}, QUIET), "WBW", 1, STUCK, id="busy behind"),
        pytest.param(
            three(QUIET, {**QUIET, "phase": "evaluation"}, QUIET), "WBW", 1, SKIPPED, id="busy ahead, in a long phase"
        ),
        pytest.param(three(QUIET, {**QUIET, "step": 41}, QUIET), "WWW", 1, SKIPPED, id="waits ahead"),
        pytest.param(three(QUIET, {**QUIET, "step": 39}, QUIET), "WWW", 1, SKIPPED, id="waits behind most"),
        pytest.param(three(QUIET, {"phase": "ending", "step": 3}, QUIET), "W-W", 1, SKIPPED, id="left early"),
        pytest.param(
            three(QUIET, {**QUIET, "silent": 9.0, "status": "unreachable"}, QUIET), "W-W", 1, UNREACHABLE, id="frozen"
        ),
        pytest.param(three(QUIET, QUIET, QUIET), "W?B", 2, STUCK, id="a stack is missing"),
        pytest.param(three(QUIET, QUIET, QUIET), "WWW", 0, UNDECIDED, id="all in the same collective"),
        pytest.param(
            three({**QUIET, "phase": "settle"}, QUIET, {**QUIET, "phase": "settle"}), "BBB", 1, STUCK, id="on a GPU"
        ),
    ],
)
def test_the_guilty_rank_is_named(beats: list[Beat], stacks: str, rank: int, kind: str) -> None:
    known = {"W": WAITING, "B": BUSY, "?": Stack(problem="no permission")}
    verdict = accuse(beats, {i: known[sign] for i, sign in enumerate(stacks) if sign in known}, BOUNDS)
    assert verdict
    assert (verdict.rank, verdict.kind) == (rank, kind)
    assert verdict.sentence.startswith(f"rank {rank} on here (pid {1000 + rank}) holds the run up: {kind}; phase ")
    assert sorted(verdict.others) == [each.rank for each in beats if each.rank != rank]


@pytest.mark.parametrize(
    "beats",
    [
        pytest.param(three({}, {}, {}), id="all at work"),
        pytest.param(three(QUIET, {**QUIET, "step": 41}, {"step": 39}), id="the hindmost has just moved"),
        pytest.param(three(QUIET, {"phase": "save", "step": 39, "quiet": 60.0}, QUIET), id="waiting for a long save"),
        pytest.param(
            three({"phase": "report", "quiet": 400.0}, {"phase": "save", "quiet": 400.0}, {"phase": "report"}),
            id="reporting while another saves",
        ),
        pytest.param([beat(rank, "evaluation", quiet=800.0) for rank in range(3)], id="the first evaluation"),
        pytest.param(
            [beat(rank, "evaluation", quiet=300.0, longest={"evaluation": 40.0}) for rank in range(3)],
            id="an evaluation that took long before",
        ),
        pytest.param([beat(rank, quiet=900.0, seconds=()) for rank in range(3)], id="the first steps compile"),
        pytest.param([beat(rank, quiet=60.0, seconds=(9.0,)) for rank in range(3)], id="long steps"),
        pytest.param([beat(rank, "ending", quiet=1e6) for rank in range(3)], id="at the end"),
        pytest.param([beat(0, quiet=900.0), beat(2, quiet=900.0)], id="a rank that has ended"),
        pytest.param([], id="no rank yet"),
        pytest.param([beat(rank, quiet=99.0, status="unreachable") for rank in range(3)], id="no node answers"),
    ],
)
def test_no_alarm(beats: list[Beat]) -> None:
    assert overdue(beats, BOUNDS) == []


def test_a_compiler_in_the_midst_of_training_is_no_hang_for_half_an_hour() -> None:
    stacks = {0: WAITING, 1: COMPILING, 2: WAITING}
    assert accuse([beat(rank, quiet=1000.0) for rank in range(3)], stacks, BOUNDS) is None
    assert accuse([beat(rank, quiet=2000.0) for rank in range(3)], stacks, BOUNDS)


def test_who_still_makes_progress_is_not_accused() -> None:
    beats = [beat(0, quiet=9.0), beat(1, "save", quiet=1.0), beat(2, quiet=9.0)]
    assert accuse(beats, {0: WAITING, 1: BUSY, 2: WAITING}, BOUNDS) is None


def test_slow_ranks_are_told_with_their_ratio() -> None:
    beats = [beat(0), beat(1, own=(0.8,) * RECENT), beat(2)]
    [slow] = slow_ranks(beats)
    assert (slow.rank, slow.ratio, slow.seconds, slow.median) == (1, pytest.approx(1.6), 0.8, 0.5)
    assert "rank 1 on here is slow: 0.8 s of its own work per step, 1.6 x" in slow.sentence
    assert slow_ranks([beat(0), beat(1, own=(0.8,) * 5), beat(2)]) == []
    trifling = [replace(each, seconds=(10.0,) * RECENT) for each in beats]
    assert slow_ranks(trifling) == []


def test_slow_is_whoever_is_so_beside_all_others() -> None:
    draw = random.Random(5)
    beats = [beat(rank, own=(draw.choice([0.3, 0.5, 0.9, draw.random()]),) * RECENT) for rank in range(40)]
    expected = {}
    for each in beats:
        others = statistics.median(statistics.median(other.own) for other in beats if other is not each)
        if statistics.median(each.own) > 1.5 * others and statistics.median(each.own) - others > 0.1:
            expected[each.rank] = others
    assert expected and {slow.rank: slow.median for slow in slow_ranks(beats)} == pytest.approx(expected)


def test_marks_tell_phases_and_the_seconds_of_steps(tmp_path: Path) -> None:
    heart, moments = Heart(tmp_path, 0, 1), []
    for step in range(7, 10):
        moments.append(time.monotonic())
        heart.at("data", step)
        time.sleep(0.01)
        heart.at("step")
        with heart.own():
            time.sleep(0.01)
        heart.at("step")
        time.sleep(0.02)
        with heart.phase("evaluation"):
            time.sleep(0.1)
    [told] = read_beats(tmp_path)
    assert (told.phase, told.step, told.within) == ("step", 9, 0)
    assert (told.pid, told.rank, told.world_size, told.node) == (os.getpid(), 0, 1, "")
    assert len(told.seconds) == 1, "the first step does not count, the last one is not over"
    first, begin, _ = moments
    assert 0.04 <= told.seconds[0] <= time.monotonic() - begin - 0.2, "an evaluation is no part of a step"
    assert 0.02 <= told.own[0] < told.seconds[0]
    assert told.longest["evaluation"] >= 0.1
    assert 0.02 <= told.longest["step"] <= time.monotonic() - first
    assert median_step([told]) == told.seconds[0]
    moment = time.monotonic()
    heart.at("step")
    [later] = read_beats(tmp_path)
    assert (later.within, later.marks) == (1, told.marks + 1)
    assert 0 <= later.quiet <= time.monotonic() - moment
    assert read_beats(tmp_path, "another node") == []


def test_a_phase_ends_also_when_it_fails(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, 1)
    heart.at("step", 3)
    with pytest.raises(OSError, match="full"), heart.phase("save"):
        raise OSError("the disk is full")
    assert read_beats(tmp_path)[0].phase == "step"


PROGRAM = """
import sys, time
from raymodels.train.heartbeat import Heart
def spin():
    while True: pass
heart = Heart(sys.argv[1], int(sys.argv[2]), 1)
for step in range(3):
    heart.at("data", step)
    heart.at("step", step)
    time.sleep(0.001)
heart.at("data", 3)
spin()
"""


@contextlib.contextmanager
def spinning(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), "0"]) as child:
        try:
            while not (beats := read_beats(folder)) or beats[0].step < 3:
                assert child.poll() is None
                time.sleep(0.02)
            yield child
        finally:
            child.kill()


def test_a_stopped_process_is_named_and_killed(tmp_path: Path) -> None:
    with spinning(tmp_path) as child:
        child.send_signal(signal.SIGSTOP)
        verdicts: list[Verdict] = []
        monitor = Monitor(Sentry(str(tmp_path)), verdicts.append, bounds=Bounds(seconds=1.0))
        deadline = time.monotonic() + 30
        while not monitor.look() and time.monotonic() < deadline:
            time.sleep(0.1)
        [verdict] = verdicts
        assert (verdict.pid, verdict.kind, verdict.phase, verdict.step) == (child.pid, STOPPED, "data", 3)
        assert verdict.stack.startswith("spin (<string>:")
        assert child.wait(10) == -signal.SIGKILL
    assert read_beats(tmp_path) == []


def test_a_process_with_the_pid_of_one_that_ended_is_left_alone(tmp_path: Path) -> None:
    with spinning(tmp_path) as child:
        [told] = read_beats(tmp_path)
        assert process(told)
        earlier = replace(told, born=told.born - 1000)
        assert process(earlier) is None
        Sentry(str(tmp_path)).kill(earlier)
        time.sleep(0.2)
        assert child.poll() is None


def test_a_stack_that_cannot_be_read_says_why() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        stack = dump(child.pid, child.pid)
        child.kill()
    assert not stack.lines
    assert stack.text.startswith("(no stack: ")
    assert "python" in stack.text.lower()


PACKAGES = "/x/raymodels/.venv/lib/python3.11/site-packages"


def frame(name: str, file: str) -> dict[str, Any]:
    return {"name": name, "filename": file, "line": 1}


def thread(number: int, *frames: dict[str, Any]) -> dict[str, Any]:
    return {"os_thread_id": number, "frames": list(frames)}


def test_what_waits_and_what_compiles_is_told_from_the_frames() -> None:
    collective = frame("all_reduce", f"{PACKAGES}/torch/distributed/distributed_c10d.py")
    ours = frame("train", "/x/raymodels/train/loop.py")
    assert read([thread(5, collective, ours)], 5).waits
    assert read([thread(5, frame("AllGatherHandle.wait", f"{PACKAGES}/deepspeed/runtime/z.py"), ours)], 5).waits
    assert not read([thread(5, frame("Queue.wait", "/x/mine/queue.py"), ours)], 5).waits
    assert not read([thread(5, frame("Condition.wait", "/usr/lib/python3.11/threading.py"), ours)], 5).waits
    backward = frame("_engine_run_backward", f"{PACKAGES}/torch/autograd/graph.py")
    assert read([thread(5, backward, ours), thread(6, collective)], 5).waits
    assert not read([thread(5, ours), thread(6, collective)], 5).waits
    assert read([thread(5, frame("compile", f"{PACKAGES}/torch/_dynamo/a.py"), ours)], 5).compiles
    assert read([thread(6, ours)], 5).problem


@pytest.mark.parametrize(
    "ours",
    [
        "/x/raymodels/train/loop.py",
        f"{PACKAGES}/raymodels/train/loop.py",
        "/usr/lib/python3/dist-packages/raymodels/train/loop.py",
        "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/mine.py",
        "<string>",
    ],
)
def test_the_head_of_a_stack_passes_over_libraries(ours: str) -> None:
    assert read([thread(5, frame("train", ours))], 5).head == f"train ({ours}:1)"
    libraries = [
        frame("all_gather_single", f"{PACKAGES}/torch/distributed/distributed_c10d.py"),
        frame("deprecated.__call__.<locals>.wrapper", f"{PACKAGES}/typing_extensions.py"),
        frame("ContextDecorator.inner", contextlib.__file__),
        frame("_run_module_as_main", "<frozen runpy>"),
    ]
    found = read([thread(5, *libraries, frame("train", ours), frame("main", "/x/main.py"))], 5)
    assert found.head == f"all_gather_single of train ({ours}:1)"
    assert read([thread(5, *libraries)], 5).head.startswith("all_gather_single (")
