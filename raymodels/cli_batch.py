"""The command `raymodels batch`: a file of requests in OpenAI's batch format, answered without an endpoint."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raymodels.config import ModelServeConfig, ServeConfig, load, validate
from raymodels.errors import ConfigError

if TYPE_CHECKING:
    from raymodels.batch.job import Counts

RECENT = 16
"""Reports, of a part each, over which the rate is taken."""
Show = Callable[["Counts", int], None]


def batch(
    input: Annotated[str, typer.Argument(metavar="INPUT.jsonl", help="Requests, one JSON object per line")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT.jsonl", help="Answers; errors go to OUTPUT.errors.jsonl")],
    model: Annotated[
        str, typer.Option(help="NAME, NAME@3 or NAME@alias; with --config, a name that it serves, an adapter's too")
    ],
    registry: Annotated[str | None, typer.Option(help="Folder or bucket; default: the config's, or ./registry")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A serve config: the model's engine, adapters, cpus and gpus")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the config")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="How many replicas answer side by side")] = 1,
    cpus: Annotated[float | None, typer.Option(min=0.01, help="CPUs of a replica; default: the config's, or 1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON")] = False,
) -> None:
    """Answer a file of requests; started again after any end, it goes on where it was.

    Exits with 0 once every line is in one of the two files, with however many errors.
    """
    settings = _settings(config, overrides, registry, model, cpus)
    served = settings.models[0]
    unnamed = model if model in served.adapters else None
    from raymodels.batch.job import Batch, run

    job = Batch(input, output, settings.registry, served, concurrency, settings.start_timeout_s, unnamed)
    with _showing() as show:
        summary = run(job, show, lambda text: print(text, file=sys.stderr, flush=True))
    result: dict[str, Any] = {
        "output": summary.output,
        "errors": summary.errors,
        "lines": summary.counts.lines,
        **asdict(summary.counts),
        "resumed": summary.before.lines,
        "seconds": round(summary.seconds, 1),
        "tokens_per_second": round((summary.counts.tokens - summary.before.tokens) / summary.seconds, 1),
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        print(f"{key:<17}  {'-' if value is None else f'{value:,}' if isinstance(value, int | float) else value}")


def _settings(
    path: Path | None, overrides: list[str] | None, registry: str | None, reference: str, cpus: float | None
) -> ServeConfig:
    """A serve config with one model, the one that is asked for."""
    if path is not None:
        config = load(path, overrides, ServeConfig)
        model = _model(config, reference)
    elif overrides:
        raise ConfigError("--set needs --config, whose settings it changes")
    else:
        config = validate({"models": [{"model": reference}]}, ServeConfig)
        model = config.models[0]
    if cpus is not None:
        model = model.model_copy(update={"cpus": cpus})
    return config.model_copy(update={"models": [model], "registry": registry or config.registry})


def _model(config: ServeConfig, reference: str) -> ModelServeConfig:
    """The config's model of that name, or with an adapter of that name; of another version, if one is named."""
    name, version = reference.partition("@")[::2]
    for model in config.models:
        if reference in (model.public_name, *model.adapters):
            return model
        if version and name == model.model.partition("@")[0]:
            return model.model_copy(update={"model": reference})
    raise ConfigError(
        f"--model {reference}: the config serves "
        f"{', '.join(name for model in config.models for name in (model.public_name, *model.adapters))}"
    )


@contextmanager
def _showing() -> Iterator[Show]:
    """What a person sees of a batch on stderr: a bar on a terminal, a line for each tenth in a pipe."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("batch"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=console) as progress:
        bar, detail = progress.add_task("batch", total=None, detail=""), _Detail()

        def show(counts: Counts, lines: int) -> None:
            progress.update(bar, completed=counts.lines, total=lines, detail=detail(counts))

        yield show


def _lines() -> Show:
    tenths, detail = -1, _Detail()

    def show(counts: Counts, lines: int) -> None:
        nonlocal tenths
        if 10 * counts.lines // lines > tenths:
            tenths = 10 * counts.lines // lines
            print(f"batch {counts.lines:,}/{lines:,}  {detail(counts)}".rstrip(), file=sys.stderr, flush=True)

    return show


class _Detail:
    """Tokens per second of the last reports, and errors so far."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def __call__(self, counts: Counts) -> str:
        self._recent.append((time.monotonic(), counts.tokens))
        (then, before), (now, tokens) = self._recent[0], self._recent[-1]
        rate = f"{(tokens - before) / (now - then):,.0f} tokens/s" if now > then else ""
        return "  ".join(filter(None, [rate, f"{counts.failed:,} failed" if counts.failed else ""]))
