"""The doctor on the machine at hand, and on machines that lack something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raymodels import doctor


def found(place: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(str(place))}


def test_what_a_check_says(tmp_path: Path) -> None:
    for check in found(tmp_path).values():
        assert check.detail
        assert bool(check.remedy) != check.ok
        assert "\n" not in check.detail


def test_names_are_unique(tmp_path: Path) -> None:
    names = [check.name for check in doctor.checks(str(tmp_path))]
    assert len(names) == len(set(names))
    assert {"python", "compiler", "ray", "torch", "gpu", "disk", "s3://", "storage", "ray token"} <= set(names)


def test_this_environment_is_complete(tmp_path: Path) -> None:
    checks = found(tmp_path)
    for name in ("python", "compiler", "ninja", *doctor.PACKAGES, "storage"):
        assert checks[name].ok, checks[name]


def test_missing_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = found(tmp_path)["compiler"]
    assert not check.ok
    assert "g++" in check.remedy


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = found(tmp_path / "file/runs")["storage"]
    assert not check.ok
    assert "run.storage" in check.remedy


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    doctor.checks(str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode, ok", [("token", True), ("disabled", False), (None, True)])
def test_token_authentication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, ok: bool) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert found(tmp_path)["ray token"].ok is ok


@pytest.mark.parametrize("installed, ok", [("2.60.0", True), ("2.59.0", False)])
def test_versions_are_held_against_the_pins(tmp_path: Path, installed: str, ok: bool) -> None:
    packages = tmp_path / f"ray-{installed}.dist-info"
    packages.mkdir()
    (packages / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ray\nVersion: {installed}\n")
    code = "import json, raymodels.doctor as d; c = d._package('ray'); print(json.dumps([c.ok, c.detail, c.remedy]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)}
    )
    is_ok, detail, remedy = json.loads(done.stdout)
    assert is_ok is ok
    assert installed in detail
    assert ok or "raymodels[train]" in remedy


def test_the_doctor_imports_nothing_heavy() -> None:
    code = "import sys, raymodels.doctor as d; d.checks(); sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
