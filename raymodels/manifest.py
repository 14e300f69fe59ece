"""MANIFEST.json: the list of a folder's files with sizes and checksums, written last.

It makes a folder of any size appear at once on any storage: *no manifest, no folder.* Checkpoints and model versions
are both committed this way, and readers trust nothing that a manifest does not vouch for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from raymodels import storage
from raymodels.errors import IntegrityError

FILE = "MANIFEST.json"
HASH_THREADS = 8


class Entry(TypedDict):
    size: int
    sha256: str


Entries = dict[str, Entry]


def inside(name: str) -> bool:
    """Whether a relative path leads into the folder that it is joined to, not out of it."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def is_committed(place: str) -> bool:
    return storage.exists(storage.join(place, FILE))


def entry(data: bytes) -> Entry:
    """Size and SHA-256 of a file's content."""
    return Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def describe(place: str, files: Iterable[str] | None = None) -> Entries:
    """Size and SHA-256 of the given files of a folder (relative paths), or of all but the manifest."""
    sizes = storage.walk(place)
    names = sorted(files) if files is not None else [name for name in sizes if name != FILE]
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashlib lets go of the interpreter lock
        digests = list(pool.map(lambda name: storage.sha256(storage.join(place, name)), names))
    return {name: Entry(size=sizes[name], sha256=digest) for name, digest in zip(names, digests, strict=True)}


def commit(place: str, entries: Entries) -> None:
    """Write the manifest; from here on the folder exists."""
    storage.write_json(storage.join(place, FILE), {"files": entries})


def read(place: str) -> Entries:
    """The entries of a committed folder.

    What they say, `verify` compares with the files; here every byte must be the one that `commit` writes for them.

    Raises:
        IntegrityError: there is no manifest, or it is not one, or names a file that is not in the folder.
        StorageError: it cannot be read.
    """
    if not is_committed(place):
        raise IntegrityError(f"{place} has no {FILE}: it was never committed")
    raw = storage.read_bytes(storage.join(place, FILE))
    try:
        content = json.loads(raw)
        entries: Entries = content["files"]
        for name, entry in entries.items():
            entry["size"], entry["sha256"]
            if not inside(name):
                raise ValueError(f"{name!r} is not in its folder")
        if storage.to_json(content) != raw:
            raise ValueError("its white space or order was changed")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{storage.join(place, FILE)} is not a manifest: {error}") from error
    return entries


def digest(place: str) -> str:
    """SHA-256 of a committed folder as a whole."""
    return hashlib.sha256(storage.to_json(read(place))).hexdigest()


def verify(place: str, share: tuple[int, int] = (0, 1)) -> Entries:
    """Compare every file with the manifest; a file beside it that the manifest does not name is ignored.

    Args:
        share: ``(i, n)`` reads the content of every n-th file from the i-th on, for n processes that verify together.

    Raises:
        IntegrityError: names the first file that is missing, or whose size or content differs.
    """
    recorded = read(place)
    sizes = storage.walk(place)
    for name, entry in recorded.items():
        if name not in sizes:
            raise IntegrityError(f"{storage.join(place, name)} is missing")
        if sizes[name] != entry["size"]:
            raise IntegrityError(f"{storage.join(place, name)} has {sizes[name]} bytes, not {entry['size']}")
    index, count = share
    for name, found in describe(place, sorted(recorded)[index::count]).items():
        if found["sha256"] != recorded[name]["sha256"]:
            raise IntegrityError(f"{storage.join(place, name)} was changed: its checksum is not the recorded one")
    return recorded
