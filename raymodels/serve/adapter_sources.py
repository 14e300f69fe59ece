"""Where adapters lie: in a folder that every node sees, or as a version in the registry; and how they get there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raymodels import manifest, storage
from raymodels.errors import AdapterError
from raymodels.registry import PREFIX, Registry, Version
from raymodels.serve.adapters import CONFIG, WEIGHTS, check_adapter


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


def publish_adapter(registry: Registry, name: str, folder: str, base: Version, alias: str | None = None) -> Version:
    """Publish an adapter in PEFT's format, checked as for serving; its card names the base and holds its settings.

    Of the folder, or a place in a bucket, go the settings and the weights alone: a trainer leaves much else there.

    Raises:
        AdapterError: it cannot be served over the base; says why.
        RegistryError: the name or alias is not usable.
    """
    with tempfile.TemporaryDirectory(prefix="raymodels-adapter-") as copied:
        for file in (CONFIG, WEIGHTS):
            if storage.exists(storage.join(folder, file)):
                storage.copy_file(storage.join(folder, file), str(Path(copied) / file))
        try:
            check_all({name: copied}, registry, base)
        except AdapterError as error:
            raise AdapterError(str(error).replace(copied, folder)) from error
        settings = json.loads((Path(copied) / CONFIG).read_text())
        card = {"base": base.reference, "base_digest": manifest.digest(base.place), "adapter": settings}
        return registry.publish(name, copied, card, alias)
