"""Samples -> tensors. The only file of this package that imports torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from raymodels.data.dataset import Split
from raymodels.data.order import Ids
from raymodels.data.shards import Int64s

Batch = dict[str, torch.Tensor]

NOBODY = -1
NO_TARGET = -100  # what torch's cross_entropy ignores


def collate(samples: list[Int64s], seq_len: int, pad_id: int) -> Batch:
    """Pad samples to the longest of them, at most ``seq_len``; full packed samples all have that length.

    Returns:
        ``input_ids``, ``attention_mask`` (1 or 0) and ``labels``, each int64 [B, T]. ``labels[b, t]`` is the target of
        ``input_ids[b, t]``, already shifted; -100 where there is none.
    """
    longest = max(1, max(len(sample) for sample in samples) - 1)
    assert longest <= seq_len, (longest, seq_len)
    shape = (len(samples), longest)
    inputs, mask, labels = np.full(shape, pad_id), np.zeros(shape, np.int64), np.full(shape, NO_TARGET)
    for row, sample in enumerate(samples):
        length = len(sample) - 1
        inputs[row, :length] = sample[:-1]
        mask[row, : max(1, length)] = 1  # attention over nothing at all would be undefined
        labels[row, :length] = sample[1:]
    arrays = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def fill_up(ids: Ids, micro_batch: int, count: int) -> Ids:
    """The ids and as many `NOBODY` as it takes to make ``count`` micro batches of one row at least."""
    missing = (count - 1) * micro_batch + 1 - len(ids)
    return np.concatenate([ids, np.full(max(0, missing), NOBODY, np.int64)])


def micro_batches(split: Split, ids: Ids, micro_batch: int) -> Iterator[Batch]:
    """The samples of the given ids, ``micro_batch`` at a time and in order; the last batch may be smaller.

    The id `NOBODY` stands for a row without targets, to fill up a batch.
    """
    nobody = np.array([split.pad_id], np.int64)
    for start in range(0, len(ids), micro_batch):
        some = ids[start : start + micro_batch]
        samples = [nobody if index == NOBODY else split.sample(int(index)) for index in some]
        yield collate(samples, split.seq_len, split.pad_id)
