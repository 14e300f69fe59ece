"""Parts of ``benchmarks.gpu`` that end in every way, for its tests. Each writes a row first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.sheet import Sheet


def holds(machine: Machine, sheet: Sheet) -> None:
    sheet.bar("figure", 1.0, "<=", 2.0)


def is_short(machine: Machine, sheet: Sheet) -> None:
    sheet.bar("slow thing", 3.0, "<=", 2.0)
    sheet.bar("no number", float("nan"), "<=", 2.0)


def half_fails(machine: Machine, sheet: Sheet) -> None:
    with sheet.guarded("first half"):
        raise RuntimeError("planted")
    sheet.bar("second half", 1.0, "<=", 2.0)


def fails(machine: Machine, sheet: Sheet) -> None:
    sheet.figure("before", 1)
    raise ValueError("planted")


def hangs(machine: Machine, sheet: Sheet) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sheet.figure("child", child.pid)
    time.sleep(600)


def is_killed(machine: Machine, sheet: Sheet) -> None:
    sheet.figure("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def measures_nothing(machine: Machine, sheet: Sheet) -> None:
    pass


def does_not_fit(machine: Machine, sheet: Sheet) -> None:
    sheet.not_run("all of it", "it needs 80 GB, 24 GB are free")
