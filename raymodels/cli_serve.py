"""The commands `raymodels autoscale`: what the autoscaling policy would have done, before it does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raymodels.config import ModelServeConfig, ServeConfig, dump, load, validate
from raymodels.display import duration
from raymodels.errors import ConfigError

if TYPE_CHECKING:
    from raymodels.serve.replay import Replay
    from raymodels.serve.traces import Trace

autoscale = typer.Typer(help="How many replicas a model has, and why.", no_args_is_help=True)

SHOWN_CHANGES = 20


@autoscale.callback()
def _group() -> None:
    """Makes `replay` a command of its own, though it is the only one."""


@autoscale.command("replay")
def replay_command(
    trace: Annotated[str, typer.Argument(help="A file of JSON lines, or bursts, diurnal or step")],
    config: Annotated[Path | None, typer.Option(help="A serve config, for its autoscaling and engine sections")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the config")] = None,
    model: Annotated[str | None, typer.Option(help="Which of the config's models; default: its only one")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Default: the config's, or 0")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Default: the config's, or 1000")] = None,
    hours: Annotated[float, typer.Option(help="Length of a synthetic trace", min=0.01, max=8784)] = 24,
    peak_rate: Annotated[float, typer.Option(help="Its most requests/s on average", min=0, max=1e6)] = 20,
    prompt_tokens: Annotated[float, typer.Option(help="Its mean per request", min=0, max=1e7)] = 200,
    completion_tokens: Annotated[float, typer.Option(help="Its mean per request", min=0, max=1e7)] = 200,
    seed: Annotated[int, typer.Option(help="Another one draws another trace", min=0)] = 0,
    replica_tokens: Annotated[float, typer.Option(help="Tokens/s of a full replica", min=1e-3)] = 400,
    request_tokens: Annotated[float, typer.Option(help="Most tokens/s of one request", min=1e-3)] = 25,
    start_up: Annotated[float | None, typer.Option(help="Seconds a replica takes; default: start_up_s", min=0)] = None,
    out: Annotated[Path | None, typer.Option(help="The picture's file; default ./replay-NAME.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, with every decision")] = False,
) -> None:
    """Simulate the policy on a recorded or synthetic trace; draw replicas, queue and waits as a picture."""
    settings = _settings(config, overrides, model, {"min_replicas": min_replicas, "max_replicas": max_replicas})
    try:
        from raymodels.serve import replay, traces
    except ImportError as error:
        raise ConfigError(f"a replay needs numpy ({error}): pip install 'raymodels[plots]'") from error
    found: Trace
    if trace in traces.SHAPES:
        found = traces.synthetic(trace, hours, peak_rate, prompt_tokens, completion_tokens, seed)
    else:
        found = traces.read(Path(trace))
    seconds = settings.autoscaling.start_up_s if start_up is None else start_up
    engine = settings.engine
    fleet = replay.Fleet(engine.max_batch, engine.max_queue, request_tokens, replica_tokens, seconds)
    result = replay.replay(found, settings.autoscaling, fleet)
    target = out or Path(f"replay-{found.name}.png")
    replay.picture(result, target)
    if as_json:
        shown = {**result.summary(), "picture": str(target), "changes": _changes(result)}
        print(json.dumps(shown, indent=2))
        return
    for key, value in {**result.summary(), "picture": str(target)}.items():
        print(f"{key:<14}  {f'{value:,.4g}' if isinstance(value, float) else value}")
    print()
    _show_changes(result)


def _settings(
    path: Path | None, overrides: list[str] | None, name: str | None, limits: dict[str, int | None]
) -> ModelServeConfig:
    """One model of a config, or the defaults, with the limits that are given."""
    raw: dict[str, Any] = {"model": "replayed", "autoscaling": {"min_replicas": 0, "max_replicas": 1000}}
    if path is not None:
        raw = dump(_model(load(path, overrides, ServeConfig), name))
    elif overrides or name:
        raise ConfigError("--set and --model need --config, whose settings they choose from")
    raw["autoscaling"] |= {key: value for key, value in limits.items() if value is not None}
    return validate({"models": [raw]}, ServeConfig).models[0]


def _model(config: ServeConfig, name: str | None) -> ModelServeConfig:
    models = {model.public_name: model for model in config.models}
    if name is None and len(models) > 1:
        raise ConfigError(f"the config serves {', '.join(models)}: choose one with --model")
    if name is not None and name not in models:
        raise ConfigError(f"--model {name}: the config serves {', '.join(models)}")
    return models[name or next(iter(models))]


def _changes(result: Replay) -> list[dict[str, Any]]:
    return [
        {
            "second": change.second,
            "before": change.before,
            "replicas": change.decision.replicas,
            "rule": change.decision.rule,
            "reason": change.decision.reason,
        }
        for change in result.changes
    ]


def _show_changes(result: Replay) -> None:
    table = Table("at", "replicas", "rule", "reason", box=None, pad_edge=False)
    for change in _changes(result)[:SHOWN_CHANGES]:
        replicas = f"{change['before']} -> {change['replicas']}"
        table.add_row(duration(change["second"]), replicas, change["rule"], change["reason"])
    console = Console(highlight=False)
    console.print(table)
    if len(result.changes) > SHOWN_CHANGES:
        console.print(f"and {len(result.changes) - SHOWN_CHANGES} more: --json shows them all")
