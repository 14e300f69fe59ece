"""Prepare a source: tokenised, in shards that can be memory-mapped, with a manifest that vouches for every byte.

    <data.prepared>/<key>/{train,eval}-<unit>.bin    document starts (int64), then token ids (uint16 or uint32)
    <data.prepared>/<key>/tokenizer/...
    <data.prepared>/<key>/manifest.json              written last: without it nothing has been prepared

The key stands for the input as cheaply as it can be told apart; the manifest's fingerprint stands for the content.
Everything is deterministic, so processes that prepare the same at once write the same bytes over each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from raymodels import storage
from raymodels.config import Config, DataConfig, TokenizerConfig
from raymodels.data import parallel, sources, tokenizer
from raymodels.data.dataset import FORMAT, MANIFEST, TOKENIZER, Prepared, open_prepared
from raymodels.data.encode import SPLITS, Job, Outcome, encode_unit, entropy
from raymodels.data.shards import dtype_for
from raymodels.data.sources import Plan
from raymodels.data.tokenizer import TokenizerFiles
from raymodels.errors import DataError

Progress = Callable[[int, int], None]


def prepare(config: Config, *, tokenizer_from: str | None = None, progress: Progress | None = None) -> Prepared:
    """Prepare ``config.data``, or find that it is prepared already.

    Args:
        config: only its ``data`` is read.
        tokenizer_from: a directory or hub id to take the tokenizer from where ``data.tokenizer`` is not set.
        progress: called with the units done and all units, first with none done.

    Raises:
        DataError: a source or tokenizer cannot be used, or there are too few documents to hold one out.
    """
    data = config.data
    plan = sources.plan(data)
    settings, loaded = _tokenizer(data, tokenizer_from)
    place = storage.join(storage.absolute(data.prepared), _key(data, plan, settings, loaded))
    if storage.exists(storage.join(place, MANIFEST)):
        return dataclasses.replace(open_prepared(place), reused=True)
    files = loaded or tokenizer.train(sources.sample(plan.units, data, settings.train_bytes), settings.vocab_size)
    job = Job(data, place, files.serialised, files.eos_id, files.vocab_size)
    try:
        files.write(storage.join(place, TOKENIZER))
        outcomes = _both_splits(job, plan, _encode(job, plan, progress or (lambda done, total: None)))
    except DataError:
        # A Ray task may still be writing; whatever it leaves is no dataset without a manifest. With one it is that of a
        # process that prepared the same, did not fail, and trains on it by now.
        if not storage.exists(storage.join(place, MANIFEST)):
            storage.delete(place)
        raise
    _see(place, outcomes)
    storage.write_json(storage.join(place, MANIFEST), _manifest(job, files, outcomes))
    return open_prepared(place)


def _see(place: str, outcomes: list[Outcome]) -> None:
    """See all shards where they were written: another process that prepared the same, and failed, deletes them.

    Raises:
        DataError: one is not there.
    """
    shards = (shard for outcome in outcomes for shard in outcome.shards.values())
    if lost := storage.unseen(place, {shard["file"]: shard["bytes"] for shard in shards}):
        raise DataError(
            f"{lost} is gone since it was written: prepare again; data.prepared must be one place that all nodes share"
        )


def _tokenizer(data: DataConfig, tokenizer_from: str | None) -> tuple[TokenizerConfig, TokenizerFiles | None]:
    settings = data.tokenizer or TokenizerConfig()
    if settings.from_ is not None:
        return settings, tokenizer.load(settings.from_, "data.tokenizer.from")
    if data.tokenizer is None and tokenizer_from is not None:
        return settings, tokenizer.load(tokenizer_from, "model.from")
    return settings, None


def _key(data: DataConfig, plan: Plan, settings: TokenizerConfig, loaded: TokenizerFiles | None) -> str:
    meaning = {
        "format": FORMAT,
        "source": plan.identity,
        "kind": data.format,
        "field": data.text_field,
        "eval_fraction": data.eval_fraction,
        "tokenizer": loaded.fingerprint if loaded else [settings.vocab_size, settings.train_bytes],
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def _encode(job: Job, plan: Plan, progress: Progress) -> list[Outcome]:
    numbered = list(enumerate(plan.units))
    progress(0, len(numbered))
    outcomes = []
    for outcome in parallel.run(partial(encode_unit, job), numbered):
        outcomes.append(outcome)
        progress(len(outcomes), len(numbered))
    return sorted(outcomes, key=lambda outcome: outcome.number)


def _both_splits(job: Job, plan: Plan, outcomes: list[Outcome]) -> list[Outcome]:
    """Where chance left one split without a document, move the nearest one there: its unit is encoded once more."""
    filled = [outcome for outcome in outcomes if outcome.documents]
    count = sum(outcome.documents for outcome in filled)
    if count < 2:
        raise DataError(
            f"data.source {job.data.source} holds {count} documents, but one to train on and one to hold out are "
            "needed: split it into several files, or into the rows of a .jsonl file"
        )
    lowest = min(filled, key=lambda outcome: outcome.lowest)
    highest = max(filled, key=lambda outcome: outcome.highest)
    if lowest.lowest >= job.data.eval_fraction:
        changed, border = lowest, math.nextafter(lowest.lowest, 1)
    elif highest.highest < job.data.eval_fraction:
        changed, border = highest, highest.highest
    else:
        return outcomes
    again = encode_unit(job, (changed.number, plan.units[changed.number]), border)
    return [again if outcome is changed else outcome for outcome in outcomes]


def _manifest(job: Job, files: TokenizerFiles, outcomes: list[Outcome]) -> dict[str, Any]:
    splits = {split: _split(split, outcomes) for split in SPLITS}
    checksums = [[shard["sha256"] for shard in splits[split]["shards"]] for split in SPLITS]
    content = json.dumps([FORMAT, files.fingerprint, checksums])
    data = job.data
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "source": {"source": data.source, "text_field": data.text_field, "eval_fraction": data.eval_fraction},
        "tokenizer": {
            "fingerprint": files.fingerprint,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.files.items()},
        },
        "vocab_size": job.vocab_size,
        "eos_id": files.eos_id,
        "pad_id": files.pad_id,
        "dtype": dtype_for(job.vocab_size).name,
        "splits": splits,
    }


def _split(split: str, outcomes: list[Outcome]) -> dict[str, Any]:
    entries = [outcome.shards[split] for outcome in outcomes if split in outcome.shards]
    counts = np.sum([outcome.counts[split] for outcome in outcomes if split in outcome.counts], axis=0)
    return {
        "shards": entries,
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": sum(entry["documents"] for entry in entries),
        "unigram_entropy_nats": entropy(counts),
    }
