"""The commands `raymodels keys`: who may call an endpoint, in the file that `http.keys_file` names."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from raymodels.config import KeysConfig, load

keys = typer.Typer(
    help="API keys of an endpoint. A running gateway reads the file again by itself.", no_args_is_help=True
)

KeysFile = Annotated[str, typer.Option("--file", help="The keys file, as in http.keys_file")]
Tenant = Annotated[str, typer.Argument(help="The tenant's name")]
SHOWN = len("sha256:") + 12


@keys.command("add")
def add(
    name: Tenant,
    file: KeysFile,
    model: Annotated[list[str] | None, typer.Option(help="A model it may call; may be repeated; default: all")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Default: no limit")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Default: no limit")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once; default: no limit")] = None,
    priority: Annotated[int | None, typer.Option(help="Share of a busy model, relative to others'; default: 1")] = None,
    metrics: Annotated[
        bool | None, typer.Option(help="Whether it may read /metrics, of all tenants; default: no")
    ] = None,
) -> None:
    """Make a key for a tenant, new or not, and print it, this once: the file keeps its hash alone."""
    from raymodels.serve.tenants import add_key

    key = add_key(
        file,
        name,
        models=model or None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        priority=priority,
        metrics=metrics,
    )
    print(f"the key of {name}, which cannot be shown again:", file=sys.stderr)
    print(key)


@keys.command("list")
def list_command(
    file: KeysFile, as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON")] = False
) -> None:
    """Every tenant: the beginnings of its keys' hashes, its models and limits."""
    tenants = load(file, root=KeysConfig).tenants
    rows = [tenant.model_dump(mode="json") | {"keys": [key[:SHOWN] for key in tenant.keys]} for tenant in tenants]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        limits = [f"{name}={value}" for name, value in row.items() if isinstance(value, int) and value is not False]
        print("\t".join([row["name"], ",".join(row["keys"]), ",".join(row["models"]), " ".join(limits)]))


@keys.command("revoke")
def revoke_command(
    name: Tenant,
    file: KeysFile,
    key: Annotated[str | None, typer.Option(help="One key alone: the beginning of its hash, as list prints it")] = None,
) -> None:
    """Take a tenant's keys out of the file; gateways that run refuse them seconds later."""
    from raymodels.serve.tenants import revoke

    count = revoke(file, name, key)
    print(f"{count} key{'s' if count != 1 else ''} of {name} revoked")
