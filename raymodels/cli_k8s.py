"""The commands `raymodels k8s`: manifests, checked as far as that is possible without a cluster."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from raymodels.errors import ConfigError

k8s = typer.Typer(help="Kubernetes manifests, checked without a cluster.", no_args_is_help=True)


class Form(StrEnum):
    text = "text"
    json = "json"


class Profile(StrEnum):
    local = "local"
    production = "production"


@k8s.callback()
def _group() -> None:
    """Makes `check` a command of its own, though it is the only one."""


@k8s.command("check")
def check_command(
    target: Annotated[Path, typer.Argument(help="A folder of kustomizations or of YAML files, or one file")],
    crds: Annotated[
        Path | None, typer.Option(help="Folder of CRDs; default: ../shared/kuberay beside the checkout")
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="How findings are printed")] = Form.text,
    profile: Annotated[
        Profile | None, typer.Option(help="Default: the annotation raymodels/profile of the set's Namespace")
    ] = None,
    kubernetes: Annotated[str, typer.Option(help="Version whose built-in kinds are meant")] = "1.34",
    app: Annotated[
        Path | None, typer.Option(help="The repository that the image has as /app; default: this package's")
    ] = None,
) -> int:
    """Find what is wrong in manifests: schemas, KubeRay's rules, references, the production checklist.

    Exit codes: 0 nothing found, 1 something found, 2 it could not be checked.
    """
    try:
        from raymodels.k8s.check import check
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'raymodels[k8s]'") from error

    checked = check(target, crds, kubernetes=kubernetes, profile=profile, app=app)
    if form is Form.json:
        print(json.dumps({"sets": checked.sets, "findings": [asdict(one) for one in checked.findings]}, indent=2))
    else:
        for finding in checked.findings:
            print(finding)
        rules = ", ".join(f"{rule} {count}" for rule, count in Counter(f.rule for f in checked.findings).most_common())
        told = f"{len(checked.findings)} findings ({rules})" if rules else "nothing found"
        print(f"{checked.objects} objects in {len(checked.sets)} sets: {told}")
    return 1 if checked.findings else 0
