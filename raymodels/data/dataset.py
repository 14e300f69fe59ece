"""A prepared dataset and its samples, read through memory maps in constant time.

A sample is 2 to ``seq_len + 1`` token ids: all but the last are the inputs, all but the first their targets. In one
pass over a split every target appears once. Packed samples are cut from the joined documents, so their targets are all
tokens but the very first; unpacked ones never cross documents, so theirs are all but each document's first.
"""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raymodels import storage
from raymodels.data import shards
from raymodels.data.shards import Int64s, Shard, Tokens
from raymodels.errors import DataError, IntegrityError
from raymodels.manifest import inside

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


class Split(ABC):
    """The samples of one split.

    Attributes:
        seq_len: the most inputs of a sample.
        pad_id: the token id to fill up shorter samples with.
    """

    def __init__(self, parts: list[Shard], seq_len: int, pad_id: int) -> None:
        self.seq_len = seq_len
        self.pad_id = pad_id
        self._shards = parts

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def sample(self, index: int) -> Int64s:
        """Sample ``index`` as int64 of shape [2 ... seq_len + 1].

        Raises:
            DataError: its file was changed since it was prepared; names the file and the sample.
        """


class Packed(Split):
    """Samples cut from the joined documents; only the last may be short."""

    @cached_property
    def _ends(self) -> Int64s:
        return np.cumsum([shard.entry["tokens"] for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        targets = int(self._ends[-1]) - 1
        return -(-targets // self.seq_len)

    def sample(self, index: int) -> Int64s:
        _check_index(index, len(self))
        start = index * self.seq_len
        return self._stretch(start, min(start + self.seq_len + 1, int(self._ends[-1])), f"sample {index}")

    def _stretch(self, start: int, stop: int, what: str) -> Int64s:
        pieces: list[Tokens] = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard = self._shards[number]
            first = int(self._ends[number]) - shard.entry["tokens"]
            piece = shard.read(start - first, stop - first, what)
            pieces.append(piece)
            start += len(piece)
            number += 1
        return np.concatenate(pieces).astype(np.int64)


class Unpacked(Split):
    """Samples of one document each; long documents are cut into several."""

    @cached_property
    def _ends(self) -> Int64s:
        return np.cumsum([self._pieces(shard).sum() for shard in self._shards], dtype=np.int64)

    @cached_property
    def _piece_ends(self) -> dict[int, Int64s]:
        """Per shard in use: the number of samples up to and including each of its documents."""
        return {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int) -> Int64s:
        _check_index(index, len(self))
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        if number not in self._piece_ends:
            self._piece_ends[number] = np.cumsum(self._pieces(shard))
        ends = self._piece_ends[number]
        within = index - int(self._ends[number]) + int(ends[-1])
        document = int(np.searchsorted(ends, within, side="right"))
        piece = within - (int(ends[document - 1]) if document else 0)
        first = int(shard.starts[document])
        start = first + piece * self.seq_len
        stop = min(start + self.seq_len + 1, first + int(shard.lengths[document]))
        what = f"sample {index}, document {document} of the file"
        return np.array(shard.read(start, stop, what), np.int64)

    def _pieces(self, shard: Shard) -> Int64s:
        """Samples per document: none where a document has no token but its end."""
        return -(-(shard.lengths - 1) // self.seq_len)


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset.

    Attributes:
        place: its folder, local or remote.
        manifest: as `prepare` describes it.
        tokenizer_dir: a local folder that ``AutoTokenizer.from_pretrained`` loads.
        reused: `prepare` found it there.
    """

    place: str
    manifest: dict[str, Any]
    tokenizer_dir: str
    reused: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the content: equal for equal tokens, wherever and whenever prepared."""
        return str(self.manifest["fingerprint"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def eos_id(self) -> int:
        return int(self.manifest["eos_id"])

    def unigram_entropy(self, split: str) -> float:
        """Nats per token of a split's token frequencies: the loss of a model that knows nothing but them."""
        return float(self.manifest["splits"][split]["unigram_entropy_nats"])

    def tokens(self, split: str) -> int:
        return int(self.manifest["splits"][split]["tokens"])

    def split(self, name: str, seq_len: int, pack: bool) -> Split:
        """The samples of ``train`` or ``eval``; from a remote place they are first copied to the local cache.

        Raises:
            DataError: the split has no samples.
            IntegrityError: a shard is missing or differs from the manifest.
        """
        entries = self.manifest["splits"][name]["shards"]
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        paths = shards.local(self.place, entries, _cache(self.manifest))
        parts = [Shard(path, entry, dtype, self.vocab_size) for path, entry in zip(paths, entries, strict=True)]
        split = (Packed if pack else Unpacked)(parts, seq_len, self.manifest["pad_id"])
        if not parts or not len(split):
            raise DataError(f"the {name} split of {self.place} has no samples: every sample needs two tokens")
        return split


def open_prepared(place: str) -> Prepared:
    """Open what `prepare` has written.

    Raises:
        DataError: it was not prepared to the end, or by another version of raymodels.
        IntegrityError: a remote tokenizer's file differs from the manifest, or that names files outside of the place.
    """
    place = storage.absolute(place)
    if not storage.exists(storage.join(place, MANIFEST)):
        raise DataError(f"{place} is not a prepared dataset: it has no {MANIFEST}; run raymodels prepare")
    manifest = storage.read_json(storage.join(place, MANIFEST))
    if manifest.get("format") != FORMAT:
        raise DataError(f"{place} has format {manifest.get('format')}, not {FORMAT}: prepare it again")
    _check_names(place, manifest)
    if storage.is_local(place):
        return Prepared(place, manifest, str(storage.local_path(place) / TOKENIZER))
    cache = _cache(manifest)
    for file, sha256 in manifest["tokenizer"]["files"].items():
        shards.fetch(place, posixpath.join(TOKENIZER, file), sha256, cache)
    return Prepared(place, manifest, str(cache / TOKENIZER))


def _check_names(place: str, manifest: dict[str, Any]) -> None:
    """What the manifest names is read, or copied to the cache: none of it may lead elsewhere."""
    files = [entry["file"] for split in manifest["splits"].values() for entry in split["shards"]]
    files += manifest.get("tokenizer", {}).get("files", {})
    for name in [*files, str(manifest["fingerprint"])]:
        if not inside(name):
            raise IntegrityError(f"{storage.join(place, MANIFEST)} names {name!r}, which is not in its folder")


def _cache(manifest: dict[str, Any]) -> Path:
    return shards.cache_folder() / "datasets" / str(manifest["fingerprint"])


def _check_index(index: int, samples: int) -> None:
    if not 0 <= index < samples:
        raise IndexError(f"sample {index} of {samples}")
