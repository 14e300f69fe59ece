"""Run directories as `raymodels runs` reads them, written by what a driver writes them with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from raymodels import storage
from raymodels.cli import main
from raymodels.cli_runs import MARKS, runs
from raymodels.config import to_yaml
from raymodels.errors import CheckpointError
from raymodels.journal import FILE, Journal
from raymodels.ledger import KINDS
from raymodels.runs import list_runs, open_run
from raymodels.train.events import Events
from tests.conftest import altered

pytestmark = pytest.mark.slow

BEGIN = 1_800_000_000.0


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `raymodels runs` in this process."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["raymodels", "runs", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


def started(at: float, attempt: int, resumed: int, **more: Any) -> dict[str, Any]:
    place = {"host": "elsewhere", "pid": 1}
    return {
        "time": BEGIN + at,
        "kind": "started",
        "attempt": attempt,
        "resumed_from_step": resumed,
        "steps": 40,
        **place,
        **more,
    }


def report(at: float, done: int, loss: float, /, **seconds: float) -> dict[str, Any]:
    figures = {"loss": loss, "world_size": 2, "memory_bytes": [1, 1]}
    return {"time": BEGIN + at, "kind": "report", "step": done, **figures, "seconds": seconds}


def write(place: str, raw: dict[str, Any], name: str, events: list[dict[str, Any]], **sections: dict[str, Any]) -> str:
    """A run directory with a config and events, as a driver makes it."""
    config = altered(raw, **({"run": {"name": name, "storage": place}} | sections))
    storage.write_bytes(f"{config.place}/config.yaml", to_yaml(config).encode())
    with Events(config.place, None) as journal:
        for event in events:
            journal(event)
    return config.place


# Down from 47 to 50; the second attempt does steps 11 to 20 again; killed at 70, down until 90.
FAILED = {"time": BEGIN + 47, "kind": "failed", "attempt": 1, "fault": "lost node", "cause": "node 3 is gone"}
HISTORY = [
    started(0, 1, 0),
    report(10, 1, 5.0, start=8, compile=2),
    report(20, 10, 4.5, step=9, data=1),
    report(40, 20, 4.0, step=20),
    FAILED | {"retry": True},
    started(50, 2, 10),
    report(70, 20, 3.9, start=5, step=15),
    {"time": BEGIN + 90, "kind": "prepared", "driver": 2},
    started(90, 3, 20, host=socket.gethostname(), driver=2),
    report(96, 30, 3.5, start=2, step=4) | {"eval_loss": 3.6, "driver": 2},
    report(99, 40, 3.0, step=3) | {"eval_loss": 3.2, "driver": 2},
    {"time": BEGIN + 100, "kind": "finished", "driver": 2},
]
SECONDS = {"start": 15, "compile": 2, "data": 1, "step": 31, "ending": 1, "lost_to_rework": 27, "down": 23}


def test_a_run_with_restarts(tiny: dict[str, Any], place: str, call: Call) -> None:
    write(place, tiny, "bumpy", HISTORY)
    shown = json.loads(call("show", "bumpy", "--storage", place, "--json").stdout)
    assert {kind: value for kind, value in shown["seconds"].items() if value} == pytest.approx(SECONDS)
    assert sum(shown["seconds"].values()) == pytest.approx(shown["wall_seconds"]) == pytest.approx(100)
    assert (shown["state"], shown["step"], shown["steps"], shown["restarts"]) == ("finished", 40, 40, 2)
    assert (shown["loss"], shown["eval_loss"], shown["goodput"]) == (3.0, 3.2, pytest.approx(0.31))
    assert shown["clock_difference_seconds"] == 0 and shown["damaged"] == []
    assert shown["attempts"][0]["cause"] == "lost node: node 3 is gone"
    assert [attempt["ending"] for attempt in shown["attempts"]] == ["failed", "killed", "finished"]


def test_the_table_and_the_timeline_of_a_run(tiny: dict[str, Any], tmp_path: Path, call: Call) -> None:
    write(str(tmp_path), tiny, "bumpy", HISTORY)
    done = call("show", "bumpy", "--storage", str(tmp_path))
    assert done.returncode == 0 and "\x1b" not in done.stdout  # no colours in a pipe
    for text in (
        "goodput 31.0%",
        "restarts 2",
        "lost node: node 3 is gone",
        "killed: the driver left no record",
        "27.0%",
    ):
        assert text in done.stdout
    lines = done.stdout.splitlines()
    starts, bar, _ = lines[3:6]
    assert len(bar) == 120
    second = [starts.index(number) / 120 * 100 for number in "123"]
    assert second == pytest.approx([0, 50, 90], abs=1)
    letter = {mark: kind for kind, (mark, _) in MARKS.items()}
    for at, kind in {3: "start", 9: "compile", 15: "step", 30: "lost_to_rework", 60: "step", 80: "down"}.items():
        assert letter[bar[round(at / 100 * 120)]] == kind, (at, bar)


def test_every_kind_has_a_letter_and_a_style_of_its_own() -> None:
    assert MARKS.keys() == KINDS.keys()
    assert len({letter for letter, _ in MARKS.values()}) == len({style for _, style in MARKS.values()}) == len(KINDS)


def test_colours_on_a_terminal(tiny: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: Any) -> None:
    write(str(tmp_path), tiny, "bumpy", HISTORY)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in call("show", "bumpy", "--storage", str(tmp_path)).stdout


def test_states_and_how_they_are_known(tiny: dict[str, Any], tmp_path: Path) -> None:
    ours, place = socket.gethostname(), str(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    now = time.time() - BEGIN
    begun = {
        "done": [*HISTORY],
        "alive": [started(0, 1, 0, host=ours, pid=os.getpid())],
        "retrying": [started(0, 1, 0, host=ours, pid=os.getpid()), FAILED | {"retry": True}],
        "killed": [started(0, 1, 0, host=ours, pid=gone.pid), report(9, 1, 5.0, start=9)],
        "heard": [started(now - 50, 1, 0)],
        "silent": [started(now - 5000, 1, 0), report(now - 4000, 1, 5.0, start=1000)],
        "slow": [started(now - 9000, 1, 0), report(now - 5000, 1, 5.0, start=4000)],
        "broken": [started(0, 1, 0), FAILED | {"retry": False}],
        "stopped": [started(0, 1, 0), FAILED | {"retry": False, "error": "KeyboardInterrupt"}],
        "refused": [started(0, 1, 0, pid=gone.pid, host=ours), FAILED | {"error": "ConfigError", "driver": 2}],
        "unborn": [],
    }
    for name, events in begun.items():
        write(place, tiny, name, events)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "a-file").touch()
    states = {run.name: run.state() for run in list_runs(place)}
    assert {name: state for name, (state, _) in states.items()} == {
        "done": "finished",
        "alive": "running",
        "retrying": "running",
        "killed": "interrupted",
        "heard": "running",
        "silent": "interrupted",
        "slow": "running",  # it once took nearly as long
        "broken": "failed",
        "stopped": "interrupted",
        "refused": "interrupted",
        "unborn": "interrupted",
    }
    assert f"process {os.getpid()} of this host is alive" in states["alive"][1]
    assert f"process {gone.pid} of this host is gone" in states["killed"][1]
    assert states["heard"][1].startswith("on host elsewhere, its last event is 5")
    assert states["broken"][1] == "lost node: node 3 is gone"


def test_the_list(tiny: dict[str, Any], place: str, call: Call) -> None:
    assert call("list", "--storage", place) == Done(0, "", "")
    write(place, tiny, "bumpy", HISTORY)
    write(place, tiny, "fresh", [])
    assert [line.split("\t") for line in call("list", "--storage", place).stdout.splitlines()] == [
        ["bumpy", "finished", "40/40", "3.0000", "31.0%", "2", "1:40", "its record ends so"],
        ["fresh", "interrupted", "0/?", "-", "0.0%", "0", "0:00", "no attempt was recorded"],
    ]
    rows = json.loads(call("list", "--json", "--storage", place).stdout)
    assert [(row["name"], row["goodput"], row["wall_seconds"]) for row in rows] == [
        ("bumpy", 0.31, 100),
        ("fresh", 0, 0),
    ]


def test_a_broken_line_is_named_and_the_rest_is_read(tiny: dict[str, Any], tmp_path: Path, call: Call) -> None:
    file = Path(write(str(tmp_path), tiny, "torn", HISTORY[:4])) / FILE
    with file.open("a") as record:
        record.write('{"time": 18000')
    assert call("list", "--storage", str(tmp_path)).stderr == ""  # a last line may be on its way
    Journal(str(tmp_path / "torn")).append(HISTORY[4])
    done = call("list", "--storage", str(tmp_path))
    assert done.stderr == f'warning: {file} line 5: not JSON, or cut off: {{"time": 18000: left out\n'
    assert done.stdout.startswith("torn\t") and done.returncode == 0
    assert len(json.loads(call("show", "torn", "--storage", str(tmp_path), "--json").stdout)["damaged"]) == 1


def test_steps_done_again_count_once_in_a_curve(tiny: dict[str, Any], tmp_path: Path) -> None:
    write(str(tmp_path), tiny, "bumpy", HISTORY[:6])
    assert open_run(str(tmp_path), "bumpy").curve("loss") == {1: 5.0, 10: 4.5}
    write(str(tmp_path), tiny, "bumpy", HISTORY[6:])
    assert open_run(str(tmp_path), "bumpy").curve("loss") == {1: 5.0, 10: 4.5, 20: 3.9, 30: 3.5, 40: 3.0}


def test_comparing_two_runs(tiny: dict[str, Any], place: str, tmp_path: Path, call: Call, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(place, tiny, "a", HISTORY)
    write(
        place,
        tiny,
        "b",
        [HISTORY[0], report(9, 10, 4.0, step=9), report(19, 20, 3.5, step=9)],
        train={"lr": 5e-3},
        zero={"stage": 3},
    )
    done = call("compare", "a", "b", "--storage", place)
    assert done.returncode == 0 and "run.name" not in done.stdout
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [
        ["10", "4.5000", "4.0000", "-0.5000"],
        ["20", "3.9000", "3.5000", "-0.4000"],
    ]
    assert _size(tmp_path / "compare-a-b.png") == (1280, 480)
    shown = json.loads(call("compare", "a", "b", "--storage", place, "--output", "x.svg", "--json").stdout)
    assert shown["difference"] == ["train.lr: 0.01 -> 0.005", "zero.stage: 2 -> 3"]
    assert all(line in done.stdout for line in shown["difference"]) and shown["picture"] == "x.svg"
    assert shown["losses"] == [{"step": 10, "a": 4.5, "b": 4.0}, {"step": 20, "a": 3.9, "b": 3.5}]
    assert "<svg" in (tmp_path / "x.svg").read_text()


def _size(png: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(png) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        assert colours and len(colours) > 10  # something is drawn
        return image.size


def test_runs_without_a_common_step(tiny: dict[str, Any], tmp_path: Path, call: Call) -> None:
    for name in ("a", "b"):
        write(str(tmp_path), tiny, name, [])
    done = call("compare", "a", "b", "--storage", str(tmp_path), "--output", str(tmp_path / "x.png"))
    assert done.returncode == 0 and "no difference" in done.stdout and "no step was reported by both" in done.stdout


def test_many_common_steps_are_thinned_out(tiny: dict[str, Any], tmp_path: Path, call: Call) -> None:
    events = [started(0, 1, 0), *(report(step, step, 1.0, step=1) for step in range(1, 101))]
    for name in ("a", "b"):
        write(str(tmp_path), tiny, name, events)
    done = call("compare", "a", "b", "--storage", str(tmp_path), "--output", str(tmp_path / "x.png"))
    steps = [line.split()[0] for line in done.stdout.splitlines() if "+0.0000" in line]
    assert len(steps) == 12 and (steps[0], steps[-1]) == ("1", "100")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bumby"], "no run 'bumby' in ./runs: did you mean bumpy?"),
        (["show", "zzz"], "no run 'zzz' in ./runs: it has bumpy; --storage names the place"),
        (["compare", "bumpy", "zzz"], "no run 'zzz' in ./runs"),
        (["compare", "bumpy", "bumpy", "--output", "x.bmp2"], "cannot write --output x.bmp2"),
        (["compare", "bumpy", "bumpy", "--output", "no/x.png"], "cannot write --output no/x.png"),
        (["list", "--storage", "nonsense://x"], "cannot open nonsense://x"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    tiny: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write("runs", tiny, "bumpy", HISTORY)
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_pictures_without_matplotlib(tiny: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: Any) -> None:
    write(str(tmp_path), tiny, "a", HISTORY)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what an import of a missing module meets
    done = call("compare", "a", "a", "--storage", str(tmp_path))
    assert done.returncode == 2 and "pip install 'raymodels[plots]'" in done.stderr


def test_an_unknown_run_is_an_error_in_python(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has none"):
        open_run(str(tmp_path), "x")


@pytest.mark.parametrize("command", ["", "list", "show", "compare"])
def test_help_teaches(call: Call, command: str) -> None:
    assert {found.name for found in runs.registered_commands} == {"list", "show", "compare"}
    done = call(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("time went" if command in ("", "show") else "--storage") in done.stdout
