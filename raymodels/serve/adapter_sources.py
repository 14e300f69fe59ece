"""Where adapters lie: in a folder that every node sees, or as a version in the registry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from raymodels import manifest, storage
from raymodels.errors import AdapterError
from raymodels.registry import PREFIX, Registry, Version
from raymodels.serve.adapters import check_adapter


def resolved(source: str, registry: Registry) -> str:
    """A source that means the same everywhere: registry:NAME@3, or an absolute folder.

    Raises:
        RegistryError: the registry has no such version.
        AdapterError: the folder is in a bucket.
    """
    if "/" not in source:
        return PREFIX + registry.resolve(source).reference
    if not storage.is_local(source):
        raise AdapterError(f"adapters: {source} is in a bucket: publish it to the registry, and name its version here")
    return storage.absolute(source)


def fetched(source: str, registry: Registry) -> str:
    """The local folder of a resolved source, verified if it comes from the registry."""
    return registry.resolve(source).fetch() if source.startswith(PREFIX) else source


def fingerprint(source: str) -> str:
    """Changes if what a resolved source stands for does."""
    return source if source.startswith(PREFIX) else f"{source} {manifest.describe(source)}"


def check_all(adapters: Mapping[str, str], registry: Registry, base: Version) -> None:
    """Read adapters for the version that they are served over, without loading that.

    Args:
        adapters: name -> resolved source.

    Raises:
        AdapterError: one cannot be served over it; says why.
    """
    if not adapters:
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.copy_file(storage.join(base.model_place, "config.json"), str(Path(folder) / "config.json"))
        for name, source in adapters.items():
            check_adapter(name, fetched(source, registry), folder)
