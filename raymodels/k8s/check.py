"""All rules on all sets of manifests at a place; what they find, with file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import raymodels
from raymodels.errors import ConfigError
from raymodels.k8s import (
    builtin,
    exposure,
    operator,
    operator_jobs,
    operator_service,
    production,
    project,
    references,
    resources,
    schemas,
    serve_table,
    serving,
    sets,
)
from raymodels.k8s.lines import locate
from raymodels.k8s.manifests import ManifestSet, Place, Problems, written
from raymodels.k8s.workloads import clusters, jobs

KUBERNETES = "1.34"
CRDS_BESIDE = "../shared/kuberay"

SET_RULES = (
    *operator.SET_RULES,
    *operator_jobs.SET_RULES,
    *references.SET_RULES,
    *resources.SET_RULES,
    *exposure.SET_RULES,
    *project.SET_RULES,
    *serving.SET_RULES,
    *serve_table.SET_RULES,
)
PRODUCTION_RULES = (*production.SET_RULES, *exposure.PRODUCTION_RULES, *serving.PRODUCTION_RULES)


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    path: str
    """Such as ``RayJob/train spec.entrypoint``; empty for what cannot be read."""
    rule: str
    message: str
    """What is wrong, and the remedy."""
    sets: tuple[str, ...] = ()
    """The folders or files in whose rendering it is found."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Checked:
    sets: list[str]
    objects: int
    findings: list[Finding]


def check(
    target: Path,
    crds: Path | None = None,
    *,
    kubernetes: str = KUBERNETES,
    profile: str | None = None,
    app: Path | None = None,
) -> Checked:
    """Everything that is wrong with the manifests of a folder or file.

    Args:
        crds: a folder of CustomResourceDefinitions; default: ``../shared/kuberay`` beside the checkout.
        kubernetes: the version whose built-in kinds are meant.
        profile: ``local`` or ``production``; default: what the annotation of each set's Namespace says.
        app: the repository that the image carries as /app; default: the one this package is in.

    Raises:
        ConfigError: there is nothing to check, or nothing to check it with.
    """
    crds, app = crds or beside_checkout(), app or checkout()
    if crds is None or not crds.is_dir():
        raise ConfigError(
            f"the CustomResourceDefinitions are not at {crds or CRDS_BESIDE}: name their folder with --crds"
        )
    if kubernetes not in builtin.versions():
        known = ", ".join(builtin.versions())
        raise ConfigError(f"--kubernetes {kubernetes} is not known to kubernetes-validate: {known}")
    rendered = sets.read(target, app, profile)
    found: dict[Finding, list[str]] = {}
    for one in rendered:
        for finding in _of_set(one, crds, kubernetes):
            names = found.setdefault(finding, [])
            names += [one.manifests.name] if one.manifests.name not in names else []
    findings = sorted(replace(finding, sets=tuple(names)) for finding, names in found.items())
    objects = sum(len(one.manifests.documents) for one in rendered)
    return Checked([one.manifests.name for one in rendered], objects, findings)


def checkout() -> Path | None:
    """The repository this package is in, if it is not installed elsewhere."""
    root = Path(raymodels.__file__).parents[1]
    return root if (root / "jobs/train.py").is_file() else None


def beside_checkout() -> Path | None:
    root = checkout()
    return (root / CRDS_BESIDE).resolve() if root and (root / CRDS_BESIDE).is_dir() else None


def _of_set(rendered: sets.Rendered, crds: Path, kubernetes: str) -> Iterator[Finding]:
    manifests = rendered.manifests
    for failure in rendered.failures:
        yield Finding(str(failure.file), failure.line, "", "cannot-be-read", failure.message)
    refused = list(_schemas(manifests, crds, kubernetes))
    for rule, place, message in [*refused, *broken_rules(manifests, sound=not refused)]:
        file, line = locate(place, rendered.folder)
        document = place.document
        path = f"{document.kind}/{document.name} {written(place.path)}".rstrip()
        yield Finding(str(file), line, path, rule, message)


def _schemas(manifests: ManifestSet, crds: Path, kubernetes: str) -> Iterator[tuple[str, Place, str]]:
    for document in manifests.documents:
        yield from schemas.problems(document, crds, kubernetes)


def broken_rules(manifests: ManifestSet, sound: bool = True) -> Iterator[tuple[str, Place, str]]:
    """Name of the rule, place and message of all that the rules find.

    Args:
        sound: whether the schemas take the set: rules may stumble over what they refuse, as a word for a number.
    """
    for rule, subject in _applied(manifests):
        try:
            found = list(rule(subject))
        except (TypeError, ValueError, AttributeError):
            if sound:
                raise
            continue
        for place, message in found:
            yield rule.__name__.replace("_", "-"), place, message


def _applied(manifests: ManifestSet) -> Iterator[tuple[Callable[[Any], Problems], Any]]:
    """Every rule with what it is about: the set, or one of its clusters, jobs or services."""
    yield from ((rule, manifests) for rule in SET_RULES)
    yield from ((rule, manifests) for rule in PRODUCTION_RULES if manifests.production)
    yield from product(operator.CLUSTER_RULES, clusters(manifests))
    yield from product(operator_jobs.JOB_RULES, jobs(manifests))
    yield from product(operator_service.SERVICE_RULES, manifests.kinds("RayService"))
