"""Run a part in a process of its own, under its own time limit, and say how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.sheet import Row, read_sheet

ROOT = Path(__file__).parents[2]
LAST_LINE = 300


@dataclass(frozen=True)
class Part:
    """``target`` is MODULE:FUNCTION, called with a `Machine` and a `Sheet`; it may take ``limit_s`` seconds."""

    name: str
    target: str
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended: ok, short, failed or not run, and why; with the rows that it had written by then."""

    part: str
    verdict: str
    why: str
    seconds: float
    rows: list[Row]


def run(part: Part, folder: Path, results: Path, kind: str, limit_s: float) -> Outcome:
    """Run a part; it, and all that it started, is killed after ``limit_s``. Its output goes to ``results/NAME.log``."""
    sheet, log = results / f"{part.name}.json", results / f"{part.name}.log"
    sheet.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.child", part.target, str(sheet), str(folder), kind]
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=ROOT, process_group=0
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # a part may leave processes of its own behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows, seconds = read_sheet(sheet), time.monotonic() - start
    verdict, why = _judged(rows, status, limit_s, log)
    return Outcome(part.name, verdict, why, seconds, rows)


def _judged(rows: list[Row], status: int | None, limit_s: float, log: Path) -> tuple[str, str]:
    if status is None:
        return "failed", f"hung, or too slow: killed after its {limit_s:.0f} s"
    if status < 0:
        return "failed", f"killed by {signal.Signals(-status).name}"
    if status > 0:
        return "failed", f"exit status {status}: {_last_line(log)}"
    if not rows:
        return "failed", "it has measured nothing"
    for verdict in ("failed", "short"):
        if named := [row.what for row in rows if row.verdict == verdict]:
            return verdict, ", ".join(named)
    skipped = all(row.verdict == "not run" for row in rows)
    return ("not run", rows[0].note) if skipped else ("ok", "")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-LAST_LINE:] if lines else "without a word"
