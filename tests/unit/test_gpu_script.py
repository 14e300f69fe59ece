"""What ``python -m benchmarks.gpu`` makes of parts that fail, hang or are killed, and of what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import wheels
from benchmarks.gpu.__main__ import PARTS, main
from benchmarks.gpu.runs import Outcome, Part, run


def outcome(name: str, folder: Path, limit_s: float = 60) -> Outcome:
    return run(Part(name, f"tests.unit.gpu_parts:{name}", limit_s), folder, folder, "cpu", limit_s)


@pytest.mark.parametrize(
    ("name", "verdict", "why", "rows"),
    [
        ("holds", "ok", "", 1),
        ("is_short", "short", "slow thing, no number", 2),
        ("half_fails", "failed", "first half", 2),
        ("fails", "failed", "exit status 1: ValueError: planted", 1),
        ("is_killed", "failed", "killed by SIGKILL", 1),
        ("measures_nothing", "failed", "it has measured nothing", 0),
        ("does_not_fit", "not run", "it needs 80 GB, 24 GB are free", 1),
        ("is_not_there", "failed", "exit status 1: AttributeError: module 'tests.unit.gpu_parts' has no attribute", 0),
    ],
)
def test_how_a_part_ends_is_told(tmp_path: Path, name: str, verdict: str, why: str, rows: int) -> None:
    found = outcome(name, tmp_path)
    assert (found.verdict, found.why[: len(why)], len(found.rows)) == (verdict, why, rows)


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    found = outcome("hangs", tmp_path, limit_s=5)
    assert (found.verdict, found.why) == ("failed", "hung, or too slow: killed after its 5 s")
    [row] = found.rows  # what it had measured by then is kept
    psutil.wait_procs([psutil.Process(int(str(row.value)))] if psutil.pid_exists(int(str(row.value))) else [], 10)
    assert not psutil.pid_exists(int(str(row.value)))


def test_one_bad_part_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part(name, f"tests.unit.gpu_parts:{name}", 60) for name in ("is_killed", "fails", "holds")]
    assert main(parts, ["--cpu", "--results", str(tmp_path)]) == 1
    ended = {part["part"]: part["verdict"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    assert ended == {"is_killed": "failed", "fails": "failed", "holds": "ok"}
    assert "killed by SIGKILL" in capsys.readouterr().out
    assert main(parts, ["--cpu", "--results", str(tmp_path), "--only", "holds"]) == 0


def test_without_time_a_part_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part("holds", "tests.unit.gpu_parts:holds", 60)]
    assert main(parts, ["--cpu", "--results", str(tmp_path), "--minutes", "0.01"]) == 0
    assert "not run after 0 s no time is left: give --minutes more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--only", "losses,typo"], "there is no such part; there are losses, step, engine, saves, offload, planner"),
        (["--minutes", "0"], "--minutes 0: give more than 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(PARTS, given)
    assert error.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PARTS, ["--results", str(tmp_path)]) == 2
    assert "torch sees no CUDA card here: run it where one is, or with --cpu" in capsys.readouterr().err


def test_an_old_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert main(PARTS, ["--cpu", "--results", str(tmp_path)]) == 2
    assert "torch 2.9.1+cu128 is too old: 2.11 or newer is needed" in capsys.readouterr().err


def test_a_missing_wheel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "_installed", lambda name: name not in ("deepspeed", "hjson"))
    (tmp_path / "hjson-3.1.0-py3-none-any.whl").touch()
    assert main(PARTS, ["--cpu", "--wheels", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert f"missing wheels in {tmp_path}: deepspeed; run benchmarks/gpu/gather" in capsys.readouterr().err


def test_wheels_are_checked_by_their_tags(tmp_path: Path) -> None:
    for name in ("deepspeed", *wheels.PLAIN):
        (tmp_path / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").touch()
    assert wheels.unfit(tmp_path, (3, 12)) == []
    (tmp_path / "msgpack-1.0-py3-none-any.whl").rename(tmp_path / "msgpack-1.0-cp311-cp311-manylinux_2_17_x86_64.whl")
    assert (wheels.unfit(tmp_path, (3, 11)), wheels.unfit(tmp_path, (3, 12))) == ([], ["msgpack"])
    (tmp_path / "psutil-1.0-py3-none-any.whl").rename(tmp_path / "psutil-1.0-cp36-abi3-macosx_11_0_arm64.whl")
    assert wheels.unfit(tmp_path, (3, 11)) == ["psutil"]
