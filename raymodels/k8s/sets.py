"""What there is to check at a place: a set of manifests per kustomization to apply, or one of plain files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymodels.errors import ConfigError
from raymodels.k8s import files, kustomize
from raymodels.k8s.manifests import Document, ManifestSet


@dataclass(frozen=True)
class Failure:
    """What cannot even be read."""

    file: Path
    line: int
    message: str


@dataclass(frozen=True)
class Rendered:
    manifests: ManifestSet
    folder: Path | None
    """Of the kustomization, if it comes from one."""
    failures: list[Failure] = field(default_factory=list)


def read(target: Path, app: Path | None, profile: str | None) -> list[Rendered]:
    """Everything there is to check at a file or folder.

    Raises:
        ConfigError: there is nothing, or what renders a kustomization is not installed.
    """
    if target.is_file() and target.name not in kustomize.NAMES:
        return [_plain(target, [target], app, profile)]
    folder = target.parent if target.is_file() else target
    if not folder.is_dir():
        raise ConfigError(f"{target} is neither a file nor a folder: name manifests or a kustomization's folder")
    if leaves := [folder] if target.is_file() else kustomize.leaves(folder):
        return [_kustomized(leaf, app, profile) for leaf in leaves]
    found = sorted(file for end in ("*.yaml", "*.yml") for file in folder.rglob(end))
    if not found:
        raise ConfigError(f"{folder} has neither a kustomization nor a YAML file: name another folder")
    return [_plain(folder, found, app, profile)]


def _kustomized(folder: Path, app: Path | None, profile: str | None) -> Rendered:
    try:
        objects = kustomize.render(folder)
    except kustomize.RenderFailed as error:
        file = kustomize.file_of(folder)
        assert file
        return Rendered(ManifestSet(str(folder), []), folder, [Failure(file, 1, f"cannot be rendered: {error}")])
    documents = [Document(value, origin) for value, origin in objects]
    return Rendered(ManifestSet(str(folder), documents, profile, app), folder)


def _plain(name: Path, found: list[Path], app: Path | None, profile: str | None) -> Rendered:
    documents: list[Document] = []
    failures: list[Failure] = []
    for file in found:
        try:
            documents += _documents(file)
        except files.Unreadable as error:
            failures.append(Failure(file, error.line, str(error)))
    return Rendered(ManifestSet(str(name), documents, profile, app), None, failures)


def _documents(file: Path) -> list[Document]:
    found: list[Document] = []
    seen: Counter[tuple[Any, Any]] = Counter()
    for node in files.nodes(file):
        value = files.construct(node)
        if not isinstance(value, dict) or not isinstance(value.get("metadata", {}), dict):
            raise files.Unreadable("is no Kubernetes object: a mapping with metadata", node.start_mark.line + 1)
        document = Document(value, file)
        found.append(Document(value, file, seen[document.kind, document.name]))
        seen[document.kind, document.name] += 1
    return found
