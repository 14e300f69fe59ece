"""What a person sees of a run: a progress bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Event = dict[str, Any]


@contextmanager
def following(steps: int) -> Iterator[Callable[[Event], None]]:
    """A consumer of a run's events that shows them on stderr, so that stdout stays free for results.

    Args:
        steps: optimizer steps of the whole run.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(steps)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=console) as progress:
        yield _Bars(progress, steps)


class _Lines:
    """One line an event; while data is prepared, one a tenth of the work."""

    def __init__(self, steps: int) -> None:
        self._pace = _Pace(steps)
        self._steps = steps
        self._tenths = -1

    def __call__(self, event: Event) -> None:
        if event["kind"] == "preparing":
            tenths = 10 * event["done"] // max(1, event["total"])
            if tenths == self._tenths:
                return
            self._tenths = tenths
        if text := sentence(event, self._steps):
            left = self._pace.left(event) if event["kind"] == "report" else None
            print(text + (f"  {left} left" if left else ""), file=sys.stderr, flush=True)


class _Bars:
    """A bar for preparing, a bar for training, and the sentences between them."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._pace = _Pace(steps)
        self._bars: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event["kind"] == "preparing":
            self._show("preparing", event["done"], event["total"], "")
        elif event["kind"] == "report" and "loss" in event:
            left = self._pace.left(event)
            self._show("training", event["step"], self._steps, numbers(event) + (f"  {left} left" if left else ""))
        elif text := sentence(event, self._steps):
            self._progress.console.print(text, highlight=False, markup=False)

    def _show(self, name: str, done: int, total: int, detail: str) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, detail="")
        self._progress.update(self._bars[name], completed=done, total=total, detail=detail)


class _Pace:
    """Time left, from the steps and seconds since the first report of this start; steps go back at a restart."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._since: tuple[int, float] | None = None
        self._last = 0

    def left(self, report: Event) -> str | None:
        if self._since is None or report["step"] <= self._last:
            self._since = (report["step"], time.monotonic())
        self._last = report["step"]
        step, start = self._since
        if report["step"] in (step, self._steps):
            return None
        return duration((time.monotonic() - start) / (report["step"] - step) * (self._steps - report["step"]))


def sentence(event: Event, steps: int) -> str:
    """An event in a line of plain text; none where it has nothing to say to a person."""
    match event["kind"]:
        case "preparing":
            return f"preparing {event['done']}/{event['total']}"
        case "prepared":
            verb = "re-using" if event["reused"] else "prepared"
            return f"{verb} {event['train_tokens']:,} training tokens in {event['place']}"
        case "started" if event["resumed_from_step"]:
            return f"resuming after step {event['resumed_from_step']} of {event['steps']}"
        case "started":
            return f"starting {event['steps']} steps"
        case "report" if "loss" in event:
            return f"step {event['step']}/{steps}  {numbers(event)}"
        case "failed" if "fault" in event:
            then = "starting again" if event["retry"] else event["remedy"]
            return f"attempt {event['attempt']} ended, {event['fault']}: {event['cause']}. {then}"
        case "notice":
            return str(event["text"])
        case _:
            return ""


def numbers(report: Event) -> str:
    """The figures of a report that a person watches."""
    held_out = f"  held-out {report['eval_loss']:.4f}" if "eval_loss" in report else ""
    return (
        f"loss {report['loss']:.4f}{held_out}  {report['tokens_per_second']:,.0f} tokens/s"
        f"  {report['model_flops_per_second'] / 1e12:.3f} TFLOP/s  {max(report['memory_bytes']) / 2**30:.1f} GiB/rank"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
