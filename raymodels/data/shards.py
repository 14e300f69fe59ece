"""The files of a prepared dataset: document starts (int64), then token ids (uint16 or uint32), all little-endian.

Document i of a shard is ``tokens[starts[i]:starts[i + 1]]``; it ends with the end-of-text token.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from raymodels import storage
from raymodels.errors import DataError, IntegrityError

START = np.dtype("<i8")
DOWNLOADS = 8
AGAIN = "restore the file, or delete its folder and prepare it again"

Tokens = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Entry(TypedDict):
    """One shard in the manifest."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write(place: str, file: str, documents: list[Tokens], dtype: np.dtype[Any]) -> Entry:
    """Write the documents' token ids as one shard, atomically."""
    starts = np.zeros(len(documents), START)
    np.cumsum([len(document) for document in documents[:-1]], out=starts[1:])
    tokens = np.concatenate(documents).astype(dtype, copy=False)
    data = starts.tobytes() + tokens.tobytes()
    storage.write_bytes(storage.join(place, file), data)
    digest = hashlib.sha256(data).hexdigest()
    return Entry(file=file, tokens=len(tokens), documents=len(documents), bytes=len(data), sha256=digest)


@dataclass(frozen=True)
class Shard:
    """A shard on a local disk, memory-mapped when it is first read."""

    path: Path
    entry: Entry
    dtype: np.dtype[Any]
    vocab_size: int

    def read(self, start: int, stop: int, what: str) -> Tokens:
        """The shard's tokens from ``start`` up to ``stop``.

        Args:
            what: what is being read, for the error.

        Raises:
            DataError: the file was changed since it was prepared; names it and ``what``.
        """
        try:
            size = self.path.stat().st_size  # reading past the end of a mapped file would kill the process
        except FileNotFoundError:
            raise DataError(f"{self.path} was removed while in use, at {what}: {AGAIN}") from None
        if size != self.entry["bytes"]:
            raise DataError(f"{self.path} has {size} bytes, not {self.entry['bytes']}, at {what}: {AGAIN}")
        tokens = self.tokens[start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise DataError(
                f"{self.path} holds token id {tokens.max()} at {what}, but the tokenizer has {self.vocab_size}: {AGAIN}"
            )
        return tokens

    @cached_property
    def starts(self) -> Int64s:
        return np.memmap(self.path, START, "r", shape=self.entry["documents"])

    @cached_property
    def tokens(self) -> Tokens:
        return np.memmap(self.path, self.dtype, "r", self.entry["documents"] * START.itemsize, self.entry["tokens"])

    @cached_property
    def lengths(self) -> Int64s:
        """Tokens per document."""
        return np.diff(self.starts, append=self.entry["tokens"])


def local(place: str, entries: list[Entry], cache: Path) -> list[Path]:
    """Where the shards lie on a local disk; those of a remote place are first copied to the cache.

    Raises:
        IntegrityError: a file is missing or differs from the manifest; it is named.
    """
    if storage.is_local(place):
        paths = [storage.local_path(storage.join(place, entry["file"])) for entry in entries]
        for path, entry in zip(paths, entries, strict=True):
            _check_size(path, entry)
        return paths
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(lambda entry: fetch(place, entry["file"], entry["sha256"], cache), entries))


def fetch(place: str, file: str, sha256: str, cache: Path) -> Path:
    """Copy one file of a remote place to the cache, unless it is there; only files with the right checksum get there.

    Raises:
        IntegrityError: the file differs from its checksum.
    """
    path = cache / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the ranks of a node, one downloads
        if not path.exists():
            partial = path.with_name(f".{path.name}.partial")
            storage.copy_file(storage.join(place, file), str(partial))
            if storage.sha256(str(partial)) != sha256:
                raise IntegrityError(
                    f"{storage.join(place, file)} differs from its manifest: delete {place} and prepare it again"
                )
            os.replace(partial, path)
    return path


def cache_folder() -> Path:
    """``RAYMODELS_CACHE``, or ``~/.cache/raymodels``."""
    return Path(os.environ.get("RAYMODELS_CACHE") or Path.home() / ".cache" / "raymodels").absolute()


def _check_size(path: Path, entry: Entry) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: delete {path.parent} and prepare it again")
    if path.stat().st_size != entry["bytes"]:
        raise IntegrityError(
            f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}: delete {path.parent} and prepare it again"
        )
