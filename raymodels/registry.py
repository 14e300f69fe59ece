"""Named, immutable, verified model versions, and the aliases that point at them; on any storage.

    <registry>/<name>/versions/<n>/claim.json        exclusively created: who publishes version n
    <registry>/<name>/versions/<n>/model/…           Hugging Face layout, safetensors
    <registry>/<name>/versions/<n>/card.json         lineage: run, config, data, step, metrics
    <registry>/<name>/versions/<n>/MANIFEST.json     every file's checksum, last: now the version exists
    <registry>/<name>/aliases/<generation>.json      all aliases; the highest generation holds

Publishing claims the next free number, so two publishers never share one, and a publisher that dies leaves a number
unused rather than a broken version. Changing an alias exclusively creates the next generation: a compare-and-swap, on
local disk, NFS, S3 and GCS alike, without locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymodels import manifest, storage
from raymodels.errors import AlreadyExists, IntegrityError, RegistryError

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
PREFIX = "registry:"
READERS = 32


@dataclass(frozen=True)
class Version:
    """One published model. ``card`` is plain data; ``place`` is the folder of the version."""

    name: str
    number: int
    place: str
    card: dict[str, Any]

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def model_place(self) -> str:
        return storage.join(self.place, "model")

    def verify(self) -> None:
        """Check every file against the manifest.

        Raises:
            IntegrityError: names the file that is missing or changed.
        """
        manifest.verify(self.place)

    def fetch(self) -> str:
        """A local directory with the verified model; a remote version is copied once to this host's cache.

        Raises:
            IntegrityError: names the file that is missing or changed.
        """
        if storage.is_local(self.place):
            self.verify()
            return str(storage.local_path(self.model_place))
        cached = _cache() / f"{self.name}-{self.number}-{manifest.digest(self.place)[:12]}"
        if not _is_whole(cached):
            _download(self.place, cached)
        return str(cached / "model")


@dataclass(frozen=True)
class Registry:
    """All versions below one place, a folder or a bucket."""

    place: str

    def names(self) -> list[str]:
        return [name for name in storage.list_names(self.place) if NAME.fullmatch(name)]

    def versions(self, name: str | None = None) -> list[Version]:
        """The committed versions of one model or of all, oldest first; none if there is no such model."""
        names = self.names() if name is None else [name]
        with ThreadPoolExecutor(READERS) as pool:  # a bucket takes its time for each of thousands of answers
            numbers = pool.map(self._numbers, names)
            claimed = [(each, number) for each, found in zip(names, numbers, strict=True) for number in found]
            opened = pool.map(lambda one: self._committed(*one), claimed)
            return [version for version in opened if version]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number."""
        generation = self._alias_generation(name)
        return self._aliases_at(name, generation)

    def has_held(self, name: str, alias: str, number: int) -> bool:
        """Whether an alias points at a version, or ever did."""
        generations = range(self._alias_generation(name), 0, -1)
        return any(self._aliases_at(name, generation).get(alias) == number for generation in generations)

    def resolve(self, reference: str) -> Version:
        """The version that NAME (its newest), NAME@3 or NAME@alias stands for.

        Raises:
            RegistryError: the model, version or alias is unknown; names those there are.
        """
        name, at, which = reference.removeprefix(PREFIX).partition("@")
        _check_name(name)
        if not at:
            return self._newest(name)
        if which.isdecimal():
            return self._numbered(name, int(which))
        aliases = self.aliases(name)
        if which not in aliases:
            self._newest(name)  # an unknown model is the better explanation
            known = ", ".join(sorted(aliases)) or "none"
            raise RegistryError(f"{name} has no alias {which!r} in {self.place}; aliases: {known}")
        return self._numbered(name, aliases[which])

    def publish(self, name: str, model_dir: str, card: dict[str, Any], alias: str | None = None) -> Version:
        """Copy a model directory in as the next version, verify the copy, and point ``alias`` at it.

        Raises:
            IntegrityError: the copy differs from the directory.
            RegistryError: the name or alias is not usable, or the directory holds no model.
        """
        _check_name(name)
        if alias:
            _check_alias(alias)
        source = manifest.describe(model_dir)
        described = "config.json" in source or "adapter_config.json" in source
        if not described or not any(file.endswith(".safetensors") for file in source):
            raise RegistryError(f"{model_dir} is not a model: it needs config.json and .safetensors files")
        number = self._claim(name)
        place = self._version_place(name, number)
        for file in source:
            storage.copy_file(storage.join(model_dir, file), storage.join(place, "model", file))
        if manifest.describe(storage.join(place, "model")) != source:
            raise IntegrityError(f"{place} differs from {model_dir} after copying: publish again")
        card = {**card, "name": name, "version": number, "published_unix_seconds": round(time.time(), 3)}
        storage.write_json(storage.join(place, "card.json"), card)
        entries = {f"model/{file}": entry for file, entry in source.items()}
        manifest.commit(place, entries | manifest.describe(place, ["card.json"]))
        if alias:
            self.set_alias(name, alias, number)
        return self._open(name, number)

    def set_alias(self, name: str, alias: str, number: int, expect: int | None = None) -> None:
        """Point an alias at a committed version, by compare-and-swap.

        Args:
            expect: refuse unless the alias points here now; none replaces whatever it is.

        Raises:
            RegistryError: no such version, the alias is not a usable name, or it is not what was expected.
        """
        _check_alias(alias)
        self._numbered(name, number)
        while True:
            generation = self._alias_generation(name)
            aliases = self._aliases_at(name, generation)
            if expect is not None and aliases.get(alias) != expect:
                raise RegistryError(f"{name}@{alias} is {aliases.get(alias)}, not {expect}: look again")
            following = storage.join(self._aliases_place(name), f"{generation + 1:08d}.json")
            try:
                return storage.create(following, storage.to_json({**aliases, alias: number}))
            except AlreadyExists:
                continue  # somebody else moved an alias in between: start from what they wrote

    def _newest(self, name: str) -> Version:
        for number in reversed(self._numbers(name)):
            if manifest.is_committed(self._version_place(name, number)):
                return self._open(name, number)
        known = ", ".join(self.names()) or "none"
        raise RegistryError(f"no model {name!r} in {self.place}; models: {known}")

    def _numbered(self, name: str, number: int) -> Version:
        if not manifest.is_committed(self._version_place(name, number)):
            newest = self._newest(name)
            raise RegistryError(f"{name} has no version {number} in {self.place}; the newest is {newest.number}")
        return self._open(name, number)

    def _committed(self, name: str, number: int) -> Version | None:
        return self._open(name, number) if manifest.is_committed(self._version_place(name, number)) else None

    def _open(self, name: str, number: int) -> Version:
        place = self._version_place(name, number)
        return Version(name, number, place, storage.read_json(storage.join(place, "card.json")))

    def _claim(self, name: str) -> int:
        claim = {"host": socket.gethostname(), "pid": os.getpid(), "unix_seconds": round(time.time(), 3)}
        number = max(self._numbers(name), default=0) + 1
        while True:
            try:
                storage.create(storage.join(self._version_place(name, number), "claim.json"), storage.to_json(claim))
                return number
            except AlreadyExists:
                number += 1

    def _numbers(self, name: str) -> list[int]:
        entries = storage.list_names(storage.join(self.place, name, "versions"))
        return sorted(int(entry) for entry in entries if entry.isdecimal())

    def _version_place(self, name: str, number: int) -> str:
        return storage.join(self.place, name, "versions", str(number))

    def _aliases_place(self, name: str) -> str:
        return storage.join(self.place, name, "aliases")

    def _alias_generation(self, name: str) -> int:
        files = storage.list_names(self._aliases_place(name))
        return max((int(file[:8]) for file in files if re.fullmatch(r"\d{8}\.json", file)), default=0)

    def _aliases_at(self, name: str, generation: int) -> dict[str, int]:
        if generation == 0:
            return {}
        found: dict[str, int] = storage.read_json(storage.join(self._aliases_place(name), f"{generation:08d}.json"))
        return found


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise RegistryError(f"{name!r} is not a name: use lower-case letters, digits, '.', '_' and '-'")


def _check_alias(alias: str) -> None:
    _check_name(alias)
    if alias.isdecimal():
        raise RegistryError(f"alias {alias!r} would read as a version number: use a word")


def _cache() -> Path:
    return Path(os.environ.get("RAYMODELS_CACHE", "~/.cache/raymodels")).expanduser() / "versions"


def _download(place: str, target: Path) -> None:
    """Copy beside the target, compare and rename: processes that fetch at once do not see each other's parts."""
    entries = manifest.read(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        whole = Path(temporary) / "version"
        for file in [*entries, manifest.FILE]:
            storage.copy_file(storage.join(place, file), str(whole / file))
        for file, copied in manifest.describe(str(whole), entries).items():
            if copied != entries[file]:
                raise IntegrityError(f"{storage.join(place, file)} was changed: its checksum is not the recorded one")
        _put(whole, target)


def _put(whole: Path, target: Path) -> None:
    while True:
        try:
            whole.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _is_whole(target):  # another process was first
            return
        with contextlib.suppress(FileNotFoundError):  # a part, left by a crash; another process may mend it too
            target.rename(whole.with_name(f"torn-{uuid.uuid4().hex}"))


def _is_whole(copy: Path) -> bool:
    try:
        manifest.verify(str(copy))
    except IntegrityError:
        return False
    return True
