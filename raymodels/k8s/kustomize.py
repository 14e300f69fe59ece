"""Kustomizations: which folders are to be applied, what they render to, and from which files they do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raymodels.errors import ConfigError
from raymodels.k8s import files

NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
TIMEOUT_S = 120
ORIGIN = "config.kubernetes.io/origin"


class RenderFailed(ConfigError):
    """Kustomize refuses a folder; the message is its own."""


def file_of(folder: Path) -> Path | None:
    """The kustomization of a folder, if it has one."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def leaves(folder: Path) -> list[Path]:
    """Every folder at or under ``folder`` that can be applied: not components, which only overlays use."""
    found = (Path(root) for root, _, _ in os.walk(folder))
    told = {place: file_of(place) for place in sorted(found)}
    return [place for place, file in told.items() if file and content(file).get("kind") != "Component"]


def content(file: Path) -> dict[str, Any]:
    [*rest] = files.nodes(file)
    told = files.construct(rest[0]) if rest else {}
    return told if isinstance(told, dict) else {}


def includes(folder: Path) -> Iterator[Path]:
    """The kustomization files that a folder's rendering uses, in the order in which they are applied."""
    file = file_of(folder)
    if file is None:
        return
    told = content(file)
    for key in ("resources", "bases", "components"):
        for place in told.get(key) or []:
            if (folder / place).is_dir():
                yield from includes(Path(os.path.normpath(folder / place)))
    yield file


def render(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """What ``kubectl kustomize`` makes of a folder: objects, each with the file that it, or its generator, stands in.

    Raises:
        ConfigError: neither kubectl nor kustomize is installed.
        RenderFailed: the folder cannot be rendered; says why.
    """
    if (kubectl := shutil.which("kubectl")) is not None:
        command = [kubectl, "kustomize"]
    elif (kustomize := shutil.which("kustomize")) is not None:
        command = [kustomize, "build"]
    else:
        raise ConfigError("kubectl (or kustomize) is not on the PATH, and renders the folder: install it")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        around = os.path.relpath(folder.resolve(), place)
        (place / NAMES[0]).write_text(f"resources: ['{around}']\nbuildMetadata: [originAnnotations]\n")
        done = subprocess.run([*command, str(place)], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RenderFailed(done.stderr.strip().replace(str(place), str(folder)))
    values = (files.construct(node) for node in files.compose(done.stdout))
    return [(value, _origin(value, place, folder)) for value in values]


def _origin(value: dict[str, Any], place: Path, folder: Path) -> Path:
    """The file an object comes from, by kustomize's annotation, which is taken off."""
    annotations = value["metadata"]["annotations"]
    told = files.parse(annotations.pop(ORIGIN))
    if not annotations:
        del value["metadata"]["annotations"]
    where = Path(os.path.normpath(place / (told.get("path") or told["configuredIn"])))
    return Path(os.path.relpath(where)) if where.is_relative_to(Path.cwd()) else where
