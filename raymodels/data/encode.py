"""Turn one unit of work into its shards. Runs on a core of its own, and knows of no other unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymodels import storage
from raymodels.config import DataConfig
from raymodels.data import shards, sources
from raymodels.data.shards import Entry, Int64s, Tokens
from raymodels.data.tokenizer import encoder
from raymodels.data.units import Document, Unit

SPLITS = ("train", "eval")
CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Job:
    """What all units have in common."""

    data: DataConfig
    place: str
    tokenizer: str
    eos_id: int
    vocab_size: int


@dataclass(frozen=True)
class Outcome:
    """What became of one unit: a shard for each split that got documents, and how often each token occurs in it.

    ``lowest`` and ``highest`` are the extremes of the documents' draws, over both splits.
    """

    number: int
    shards: dict[str, Entry]
    counts: dict[str, Int64s]
    lowest: float
    highest: float

    @property
    def documents(self) -> int:
        return sum(entry["documents"] for entry in self.shards.values())


def encode_unit(job: Job, numbered: tuple[int, Unit], border: float | None = None) -> Outcome:
    """Tokenise a unit's documents, each followed by the end-of-text token, and write its shards.

    Args:
        job: what to do.
        numbered: the unit's number, from which its shards are named, and the unit.
        border: documents that draw less are held out; default ``eval_fraction``.
    """
    number, unit = numbered
    border = job.data.eval_fraction if border is None else border
    encoded: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
    draws: list[float] = []
    for document, tokens in _encoded(job, unit):
        draws.append(document.draw)
        encoded["eval" if draws[-1] < border else "train"].append(tokens)
    written = {split: _write(job, f"{split}-{number:05d}.bin", encoded[split]) for split in SPLITS}
    counts = {split: _counts(encoded[split], job.vocab_size) for split in SPLITS if written[split]}
    entries = {split: entry for split, entry in written.items() if entry}
    return Outcome(number, entries, counts, min(draws, default=1.0), max(draws, default=0.0))


def entropy(counts: Int64s) -> float:
    """The entropy of a distribution of tokens, in nats per token: the loss of the best model without context."""
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _encoded(job: Job, unit: Unit) -> Iterator[tuple[Document, Tokens]]:
    tokenizer: Any = encoder(job.tokenizer)
    dtype = shards.dtype_for(job.vocab_size)
    for batch in _batches(sources.documents(unit, job.data)):
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, np.array([*encoding.ids, job.eos_id], dtype)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches of about a megabyte: the tokenizers library holds some hundred bytes for each token of a batch."""
    for first in documents:
        batch, size = [first], len(first.text)
        while size < CHARACTERS_AT_ONCE and (more := list(itertools.islice(documents, 1))):
            batch += more
            size += len(more[0].text)
        yield batch


def _write(job: Job, file: str, documents: list[Tokens]) -> Entry | None:
    if not documents:
        storage.delete(storage.join(job.place, file))  # of an attempt that split the documents in another way
        return None
    return shards.write(job.place, file, documents, shards.dtype_for(job.vocab_size))


def _counts(documents: list[Tokens], vocab_size: int) -> Int64s:
    return np.bincount(np.concatenate(documents), minlength=vocab_size).astype(np.int64)
