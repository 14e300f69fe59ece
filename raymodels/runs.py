"""Runs as anyone can read them from their directories: what they are, how they went, how two of them differ."""

from __future__ import annotations

import difflib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from raymodels import journal, storage
from raymodels.config import Config, changed_settings, from_yaml
from raymodels.errors import CheckpointError, ConfigError
from raymodels.ledger import Account, Attempt, account

READERS = 8
# A driver on another host counts as running until it is silent for this long, or for 3 times its longest pause so far.
PATIENCE_SECONDS = 300.0
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit", "Stopped")


@dataclass(frozen=True)
class Run:
    """A run directory as it was read."""

    name: str
    place: str
    record: journal.Record
    account: Account

    @property
    def steps(self) -> int | None:
        """How many steps it is to make; none before its first attempt."""
        attempts = self.account.attempts
        return attempts[-1].event.get("steps") if attempts else None

    def config(self) -> Config:
        """The config it was started with."""
        place = storage.join(self.place, "config.yaml")
        return from_yaml(storage.read_bytes(place).decode(), place)

    def curve(self, figure: str) -> dict[int, float]:
        """A figure of the reports, such as loss or eval_loss, by step. Steps done again count as done last."""
        values: dict[int, float] = {}
        for event in self.record.events:
            if "resumed_from_step" in event:
                values = {step: value for step, value in values.items() if step <= event["resumed_from_step"]}
            elif event["kind"] == "report" and figure in event:
                values[event["step"]] = float(event[figure])
        return dict(sorted(values.items()))

    def last(self, figure: str) -> float | None:
        return next(reversed(self.curve(figure).values()), None)

    def state(self, now: float | None = None) -> tuple[str, str]:
        """finished, running, failed or interrupted, and how that is known."""
        account, attempts = self.account, self.account.attempts
        if account.finished:
            return "finished", "its record ends so"
        if not attempts:
            return "interrupted", "no attempt was recorded"
        last = attempts[-1]
        if last.ending == "failed" and not last.failure.get("retry"):
            stopped = last.failure.get("error") in INTERRUPTIONS
            return ("interrupted" if stopped else "failed"), last.cause
        return self._driver(last, time.time() if now is None else now)

    def row(self) -> dict[str, Any]:
        """The run in one row of plain data."""
        state, known = self.state()
        return {
            "name": self.name,
            "state": state,
            "step": self.account.step,
            "steps": self.steps,
            "loss": self.last("loss"),
            "goodput": self.account.goodput,
            "restarts": self.account.restarts,
            "wall_seconds": self.account.wall,
            "known": known,
        }

    def _driver(self, attempt: Attempt, now: float) -> tuple[str, str]:
        """Whether the driver of an attempt without an end is still there."""
        host, pid = attempt.event.get("host"), attempt.event.get("pid")
        since = attempt.started
        times = [since, *(event["time"] for event in self.record.events if event["time"] > since)]
        silent = now - times[-1]
        heard = f"its last event is {silent:,.0f} s old"
        if pid and host == socket.gethostname():
            if _alive(pid):
                return "running", f"process {pid} of this host is alive, {heard}"
            return "interrupted", f"process {pid} of this host is gone, {heard}"
        pauses = [after - before for before, after in pairwise(times)]
        patience = max(PATIENCE_SECONDS, 3 * max(pauses, default=0.0))
        return ("running" if silent < patience else "interrupted"), f"on host {host or 'unknown'}, {heard}"


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other: how the configs differ, and the losses at the steps that both reported."""

    difference: list[str]
    losses: dict[int, tuple[float, float]]


def list_runs(place: str) -> list[Run]:
    """Every run in a folder or bucket of runs, by name."""
    names = storage.list_names(place)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _read(place, name), names)
        return [run for run in found if run is not None]


def open_run(place: str, name: str) -> Run:
    """One run of a folder or bucket of runs.

    Raises:
        CheckpointError: there is none of that name; names the nearest one.
    """
    if run := _read(place, name):
        return run
    names = [run.name for run in list_runs(place)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}; --storage names the place"
    raise CheckpointError(f"no run {name!r} in {place}: {hint}")


def compare(first: Run, second: Run) -> Comparison:
    """How two runs differ. Their names do not count."""
    changed = [line for line in changed_settings(first.config(), second.config()) if not line.startswith("run.name:")]
    ours, theirs = first.curve("loss"), second.curve("loss")
    return Comparison(changed, {step: (ours[step], theirs[step]) for step in ours if step in theirs})


def picture(first: Run, second: Run, output: Path) -> None:
    """Draw the losses of two runs over their steps, as the kind of file that ``output`` ends in (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib ({error}): pip install 'raymodels[plots]'") from error
    panels = {"loss": "training loss", "eval_loss": "held-out loss"}
    shown = [figure for figure in panels if first.curve(figure) or second.curve(figure)] or ["loss"]
    figure = Figure(figsize=(6.4 * len(shown), 4.8), layout="constrained")
    for name, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for run, line in ((first, "-"), (second, "--")):
            curve = run.curve(name)
            axes.plot(list(curve), list(curve.values()), line, marker="o", markersize=3, label=run.name)
        axes.set(title=panels[name], xlabel="step", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(output)
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write --output {output}: {error}; give a .png, .svg or .pdf in a folder") from error


def _read(place: str, name: str) -> Run | None:
    run = storage.join(place, name)
    if not storage.exists(storage.join(run, "config.yaml")):
        return None
    record = journal.read(run)
    return Run(name, run, record, account(record.events))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
