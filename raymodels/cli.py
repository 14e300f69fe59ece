"""The command `raymodels`: parse, call, print. Everything it does is one function call away in Python.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 something failed, 2 bad input, 130
interrupted; those of jobs on a cluster are in `cli_jobs`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from raymodels.cli_batch import batch
from raymodels.cli_jobs import cluster, jobs
from raymodels.cli_k8s import k8s
from raymodels.cli_keys import keys
from raymodels.cli_runs import runs
from raymodels.cli_serve import autoscale
from raymodels.config import Config, ServeConfig, dump, load, to_yaml
from raymodels.errors import ConfigError, RaymodelsError

if TYPE_CHECKING:
    from raymodels.client import Client

app = typer.Typer(
    help="One config trains a Transformer with Ray Train and DeepSpeed ZeRO, registers the checkpoint and serves it.",
    epilog="Start with: raymodels doctor, then raymodels train jobs/configs/demo.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models = typer.Typer(help="The registry: named, immutable, checksummed model versions.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(runs, name="runs")
app.add_typer(keys, name="keys")
app.add_typer(k8s, name="k8s")
app.add_typer(jobs)
app.add_typer(cluster, name="cluster")
app.add_typer(autoscale, name="autoscale")
app.command("batch")(batch)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config, such as jobs/configs/demo.yaml")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value; may be repeated")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
RegistryPlace = Annotated[str, typer.Option("--registry", help="Folder or bucket of the registry")]
Url = Annotated[str, typer.Option("--url", envvar="RAYMODELS_URL", help="Where the endpoint is")]
Ca = Annotated[str | None, typer.Option("--ca", envvar="RAYMODELS_CA", help="PEM file of the CA to trust for https")]
ApiKeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="Holds the key; default: RAYMODELS_API_KEY")]
ModelName = Annotated[str | None, typer.Option("--model", help="Default: the only model that is served")]


def main() -> None:
    """Run the command line; errors that are the user's to mend are one line on stderr."""
    # An end from outside unwinds as Ctrl-C does, so that workers and endpoints are ended, as in `jobs`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(prog_name="raymodels", standalone_mode=False))  # it returns the exit code
    except RaymodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Tokenise a config's source into a prepared dataset, or find that it is there already."""
    from raymodels.display import following
    from raymodels.train.launch import prepare_data

    settings = load(config, overrides)
    with following(settings.train.steps) as on_event:
        prepared = prepare_data(settings, on_event)
    result = {"place": prepared.place, "reused": prepared.reused, "fingerprint": prepared.fingerprint}
    for split in ("train", "eval"):
        result[f"{split}_tokens"] = prepared.tokens(split)
        result[f"{split}_unigram_entropy"] = prepared.unigram_entropy(split)
    _show(result, as_json)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = [],
    dry_run: Annotated[bool, typer.Option(help="Print the resolved config and DeepSpeed's, and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a config to its end; started again, it resumes from its last committed checkpoint."""
    settings = load(config, overrides)
    if dry_run:
        _dry_run(settings, as_json)
        return
    from raymodels.display import following
    from raymodels.train.launch import train as run

    with following(settings.train.steps) as on_event:
        result = run(settings, on_event)
    _show(
        {
            "run": result.place,
            "checkpoint": result.checkpoint.place,
            "version": result.version.reference if result.version else None,
            "start_up_seconds": result.phases,
            **result.metrics,
        },
        as_json,
    )


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """The held-out loss of a run's newest checkpoint, in nats per token."""
    from raymodels.display import following
    from raymodels.train.launch import evaluate as run

    settings = load(config, overrides)
    with following(settings.train.steps) as on_event:
        result = run(settings, on_event)
    _show(result, as_json)


@app.command()
def export(
    place: Annotated[str, typer.Argument(help="A run directory (its newest checkpoint) or one checkpoint's folder")],
    target: Annotated[Path, typer.Argument(help="A new folder for the Hugging Face model")],
) -> None:
    """Write a checkpoint as a Hugging Face model directory that from_pretrained loads."""
    from raymodels.checkpoint.export import export as write
    from raymodels.checkpoint.layout import open_checkpoint

    print(write(open_checkpoint(place), target))


@models.command("list")
def list_models(registry: RegistryPlace = "./registry", as_json: AsJson = False) -> None:
    """Every version, its aliases, step and held-out loss."""
    from raymodels.registry import Registry

    found = Registry(registry)
    aliases = functools.cache(found.aliases)
    rows = []
    for version in found.versions():
        named = [alias for alias, number in aliases(version.name).items() if number == version.number]
        card = version.card
        rows.append(
            {
                "version": version.reference,
                "aliases": ", ".join(sorted(named)),
                "run": card.get("run"),
                "step": card.get("step"),
                "held-out loss": card.get("metrics", {}).get("eval_loss"),
            }
        )
    _show_rows(rows, as_json)


@models.command("show")
def show_model(
    reference: Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias")],
    registry: RegistryPlace = "./registry",
    verify: Annotated[bool, typer.Option(help="Compare every file with its checksum")] = False,
) -> None:
    """A version's card as JSON: where it came from and how good it is."""
    from raymodels.registry import Registry

    version = Registry(registry).resolve(reference)
    if verify:
        version.verify()
    print(json.dumps({"place": version.place, **version.card}, indent=2))


@models.command("tag")
def tag_model(
    reference: Annotated[str, typer.Argument(help="The version to point at: NAME, NAME@3 or NAME@alias")],
    alias: Annotated[str, typer.Argument(help="The alias to set, such as prod")],
    registry: RegistryPlace = "./registry",
    expect: Annotated[int | None, typer.Option(help="Refuse unless the alias points at this version now")] = None,
) -> None:
    """Point an alias at a version, by compare-and-swap."""
    from raymodels.registry import Registry

    found = Registry(registry)
    version = found.resolve(reference)
    found.set_alias(version.name, alias, version.number, expect)
    print(f"{version.name}@{alias} -> {version.reference}")


@models.command("publish")
def publish_model(
    source: Annotated[str, typer.Argument(help="A YAML config, or the folder of a LoRA adapter in PEFT's format")],
    overrides: Overrides = [],
    name: Annotated[str | None, typer.Option(help="Of an adapter: the name to publish it as")] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter: what it was trained over, such as NAME@3")] = None,
    alias: Annotated[str | None, typer.Option(help="Of an adapter: an alias to move to it, such as prod")] = None,
    registry: Annotated[str | None, typer.Option(help="Of an adapter: default ./registry")] = None,
) -> None:
    """Publish the newest checkpoint of a config's run as its publish section says, or an adapter."""
    if Path(source).is_dir() or "://" in source or (name and not Path(source).exists()):
        if overrides or not (name and base):
            raise ConfigError(f"{source} is a folder, so an adapter's: give --name and --base, and no --set")
        print(_publish_adapter(source, name, base, alias, registry or "./registry"))
        return
    if name or base or alias or registry:
        raise ConfigError("--name, --base, --alias and --registry are an adapter's; a config says it in publish")
    settings = load(source, overrides)
    if settings.publish is None:
        raise ConfigError("publish: missing; give publish.name")
    from raymodels.checkpoint.layout import open_checkpoint
    from raymodels.publish import publish

    print(publish(settings, open_checkpoint(settings.place)).reference)


def _publish_adapter(folder: str, name: str, base: str, alias: str | None, place: str) -> str:
    from raymodels.registry import Registry
    from raymodels.serve.adapter_sources import publish_adapter

    registry = Registry(place)
    return publish_adapter(registry, name, folder, registry.resolve(base), alias).reference


@app.command()
def serve(config: ConfigPath, overrides: Overrides = []) -> None:
    """Serve model versions behind an OpenAI-shaped HTTP endpoint until interrupted."""
    settings = load(config, overrides, ServeConfig)
    from raymodels.serve.deploy import deploy

    endpoint = deploy(settings)
    try:
        print(f"serving {', '.join(endpoint.models)} at {endpoint.url}  (Ctrl-C ends it)", flush=True)
        endpoint.wait()
    finally:
        endpoint.close()


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="The text to continue")],
    model: ModelName = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable")] = None,
    url: Url = "http://127.0.0.1:8000",
    ca: Ca = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, printed as it streams in."""
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with _client(url, ca, api_key_file) as client:
        if as_json:
            print(client.complete(prompt, model=model, **sampling).model_dump_json(indent=2))
            return
        for delta in client.stream(prompt, model=model, **sampling):
            print(delta.text, end="", flush=True)
    print()


@app.command()
def chat(
    message: Annotated[str, typer.Argument(help="What to say")],
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="Instructions that come first")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.7,
    url: Url = "http://127.0.0.1:8000",
    ca: Ca = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Ask a chat model, printed as it streams in."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    with _client(url, ca, api_key_file) as client:
        for delta in client.stream(messages=messages, model=model, max_tokens=max_tokens, temperature=temperature):
            print(delta.text, end="", flush=True)
    print()


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = [],
    device_memory: Annotated[
        str | None, typer.Option(help="Of one worker, such as 80GB; default: workers.device_memory")
    ] = None,
    storage_bandwidth: Annotated[float, typer.Option(help="Bytes a second that storage takes in all")] = 1e9,
    as_json: AsJson = False,
) -> None:
    """What a config takes in memory, communication and storage, by ZeRO stage and offload; loads no weights."""
    settings = load(config, [*overrides, *([f"workers.device_memory={device_memory}"] if device_memory else [])])
    from raymodels.train.planner import plan as run
    from raymodels.train.planner.table import summary, table

    planned = run(settings, storage_bandwidth=storage_bandwidth)
    if as_json:
        print(json.dumps(asdict(planned), indent=2))
    else:
        _show(summary(planned), as_json)
        Console(width=150).print(table(planned))
    planned.must_fit()


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and the remedy for each."""
    from raymodels.doctor import checks

    found = checks()
    rows = [{"check": c.name, "ok": c.ok, "detail": c.detail, "remedy": "" if c.ok else c.remedy} for c in found]
    _show_rows(rows, as_json)
    if not all(check.ok or check.optional for check in found):
        raise typer.Exit(1)


def _client(url: str, ca: str | None, api_key_file: Path | None) -> Client:
    """A client with an API key from a file or the environment: all users of a machine see its command lines."""
    from raymodels.client import Client

    key = os.environ.get("RAYMODELS_API_KEY") or None
    if api_key_file is not None:
        try:
            key = api_key_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"--api-key-file: cannot read {api_key_file}: {error.strerror}") from error
    return Client(url, key, ca=ca)


def _dry_run(settings: Config, as_json: bool) -> None:
    from raymodels.train.zero import deepspeed_config

    derived = deepspeed_config(settings, settings.workers.most)
    if as_json:
        print(json.dumps({"config": dump(settings), "deepspeed": derived}, indent=2))
    else:
        print(
            f"# The config as resolved\n{to_yaml(settings)}\n# What DeepSpeed is given\n{json.dumps(derived, indent=2)}"
        )


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    width = max(len(key) for key in result)
    for key, value in result.items():
        print(f"{key:<{width}}  {_text(value)}")


def _show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    elif sys.stdout.isatty():
        table = Table(*(rows[0] if rows else []), box=None)
        for row in rows:
            table.add_row(*(_text(value) for value in row.values()))
        Console().print(table)
    else:
        for row in rows:
            print("\t".join(_text(value) for value in row.values()))


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case dict():
            return "  ".join(f"{key} {_text(item)}" for key, item in value.items())
        case _:
            return str(value)
