"""The commands `raymodels runs`: what became of the runs in a folder or bucket, and what their time went to."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymodels.display import duration
from raymodels.ledger import KINDS, Account
from raymodels.runs import Comparison, Run, list_runs, open_run, picture
from raymodels.runs import compare as compare_runs

runs = typer.Typer(help="Training runs: how each went, and where its time went.", no_args_is_help=True)

Storage = Annotated[str, typer.Option("--storage", help="Folder or bucket of the runs, as in run.storage")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Name = Annotated[str, typer.Argument(help="A run's name, as in run.name")]

# A letter and a colour for each kind, so that the timeline can be read with either.
MARKS = {
    "scheduling": ("q", "white on grey37"),
    "start": ("i", "white on blue"),
    "restore": ("r", "white on dark_cyan"),
    "compile": ("c", "black on cyan"),
    "data": ("d", "black on yellow"),
    "step": ("█", "green"),
    "evaluation": ("e", "black on pale_green3"),
    "blocked_by_save": ("s", "black on orange1"),
    "other": ("o", "black on grey70"),
    "ending": ("f", "white on purple4"),
    "lost_to_rework": ("x", "white on red"),
    "down": ("-", "red"),
    "unaccounted": ("?", "magenta"),
}
UNKNOWN = ("?", "magenta")
COMMON_STEPS = 12


@runs.command("list")
def list_command(storage: Storage = "./runs", as_json: AsJson = False) -> None:
    """Every run: its state and how that is known, steps, last loss, goodput, restarts and wall time."""
    found = list_runs(storage)
    for run in found:
        _warn(run)
    rows = [run.row() for run in found]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ["name", "state", "step", "loss", "goodput", "restarts", "wall time", "how that is known"]
    cells = [
        [
            row["name"],
            row["state"],
            f"{row['step']}/{row['steps'] or '?'}",
            _number(row["loss"]),
            f"{row['goodput']:.1%}",
            str(row["restarts"]),
            duration(row["wall_seconds"]),
            row["known"],
        ]
        for row in rows
    ]
    if sys.stdout.isatty():
        _print(_table(columns, cells))
    else:
        for row in cells:
            print("\t".join(row))


@runs.command("show")
def show_command(name: Name, storage: Storage = "./runs", as_json: AsJson = False) -> None:
    """Where a run's time went: goodput, seconds by kind, a timeline, and its restarts with their causes."""
    run = open_run(storage, name)
    _warn(run)
    if as_json:
        print(json.dumps(_shown(run), indent=2))
        return
    console, account = Console(highlight=False), run.account
    row = run.row()
    console.print(Text(f"{run.name}  {row['state']}: {row['known']}", "bold"))
    held_out = run.last("eval_loss")
    figures = f"step {row['step']}/{row['steps'] or '?'}  loss {_number(row['loss'])}  held-out {_number(held_out)}"
    console.print(f"{figures}  goodput {account.goodput:.1%}  restarts {account.restarts}")
    if account.wall:
        console.print()
        console.print(timeline(account, console.width))
        console.print()
        console.print(_kinds(account))
    if account.attempts:
        console.print()
        console.print(_attempts(account))


@runs.command("compare")
def compare_command(
    first: Name,
    second: Name,
    storage: Storage = "./runs",
    output: Annotated[Path | None, typer.Option(help="The picture's file; default ./compare-A-B.png")] = None,
    as_json: AsJson = False,
) -> None:
    """Two runs beside each other: how their configs differ, and their losses as a picture and a table."""
    pair = open_run(storage, first), open_run(storage, second)
    for run in pair:
        _warn(run)
    compared = compare_runs(*pair)
    target = output or Path(f"compare-{first}-{second}.png")
    picture(*pair, target)
    if as_json:
        losses = [{"step": step, first: ours, second: theirs} for step, (ours, theirs) in compared.losses.items()]
        result = {"runs": [run.row() for run in pair], "difference": compared.difference, "losses": losses}
        print(json.dumps({**result, "picture": str(target)}, indent=2))
        return
    print("config:", *(compared.difference or ["no difference"]), sep="\n  ")
    print(f"picture: {target}")
    _print(_losses(compared, first, second))


def timeline(account: Account, width: int) -> Text:
    """Where each attempt began, one letter of `MARKS` for each stretch of time, and the times of begin and end."""
    starts = [" "] * width
    for attempt in account.attempts:
        column = min(width - 1, int((attempt.started - account.begin) / account.wall * width))
        starts[column : column + len(str(attempt.number))] = str(attempt.number)
    bar = Text("".join(starts[:width]).rstrip() + "\n", "bold")
    for kind in account.timeline(width):
        bar.append(*MARKS.get(kind, UNKNOWN))
    begin, end = _clock(account.begin), _clock(account.begin + account.wall)
    return bar.append(f"\n{begin}{end:>{max(0, width - len(begin))}}", "default")


def _kinds(account: Account) -> Table:
    table = Table("", "kind", "time", "share", "", box=None, pad_edge=False)
    table.columns[2].justify = table.columns[3].justify = "right"
    for kind, seconds in account.seconds.items():
        mark = Text(*MARKS.get(kind, UNKNOWN))
        share = f"{_positive_zero(seconds / account.wall, 3):.1%}"
        table.add_row(mark, kind, _seconds(seconds), share, Text(KINDS.get(kind, ""), "dim"))
    clocks = f"the workers' own clocks differ by {account.error / account.wall:.2%} of it"
    table.add_row("", "wall time", _seconds(account.wall), "100.0%", Text(clocks, "dim"))
    return table


def _attempts(account: Account) -> Table:
    rows = []
    for attempt in account.attempts:
        steps = f"{attempt.resumed_from_step} -> {attempt.step}"
        ending = f"{attempt.ending}: {attempt.cause}" if attempt.cause else attempt.ending
        workers = str(attempt.workers or "-")
        rows.append([str(attempt.number), _clock(attempt.started), steps, workers, _seconds(attempt.down), ending])
    return _table(["attempt", "started", "steps", "workers", "down before", "how it ended"], rows)


def _losses(compared: Comparison, first: str, second: str) -> Table | str:
    steps = list(compared.losses)
    if not steps:
        return "no step was reported by both"
    spread = max(1, len(steps) - 1)
    count = min(COMMON_STEPS, len(steps))
    rows = []
    for step in sorted({steps[round(place * spread / max(1, count - 1))] for place in range(count)}):
        ours, theirs = compared.losses[step]
        rows.append([str(step), f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}"])
    return _table(["step", first, second, "difference"], rows)


def _shown(run: Run) -> dict[str, Any]:
    account = run.account
    attempts = [
        {
            "attempt": attempt.number,
            "started": attempt.started,
            "ended": attempt.ended,
            "resumed_from_step": attempt.resumed_from_step,
            "step": attempt.step,
            "workers": attempt.workers,
            "down_seconds": attempt.down,
            "ending": attempt.ending,
            "failure": dict(attempt.failure),
            "cause": attempt.cause,
        }
        for attempt in account.attempts
    ]
    more = {"place": run.place, "eval_loss": run.last("eval_loss"), "begin": account.begin}
    times = {"seconds": account.seconds, "clock_difference_seconds": account.error}
    return {**run.row(), **more, **times, "attempts": attempts, "damaged": run.record.damaged}


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print(shown: Table | str) -> None:
    Console(highlight=False).print(shown)


def _warn(run: Run) -> None:
    for sentence in run.record.damaged:
        print(f"warning: {sentence}: left out", file=sys.stderr)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(seconds: float) -> str:
    return f"{_positive_zero(seconds, 1):.1f} s" if abs(seconds) < 60 else duration(seconds)


def _positive_zero(value: float, digits: int) -> float:
    """Rounded, and never -0."""
    return round(value, digits) + 0.0


def _clock(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))
