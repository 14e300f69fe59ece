import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymodels.data.batches import NOBODY, collate, fill_up, micro_batches
from raymodels.data.dataset import Split

PAD = 9


class Counting(Split):
    """Sample i counts from i and has i + 2 tokens."""

    def __len__(self) -> int:
        return 5

    def sample(self, index: int) -> np.ndarray:
        return np.arange(index, 2 * index + 2)


def test_collate_shifts_pads_and_masks() -> None:
    batch = collate([np.array([1, 2, 3, 4]), np.array([5, 6])], 8, PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert batch["labels"].tolist() == [[2, 3, 4], [6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_micro_batches_follow_the_ids() -> None:
    batches = list(micro_batches(Counting([], 8, PAD), np.array([3, 0, 2]), 2))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[3, 4, 5, 6], [0, PAD, PAD, PAD]], [[2, 3, 4]]]


@given(rows=st.integers(0, 30), micro_batch=st.integers(1, 8), extra=st.integers(0, 4))
def test_filling_up_gives_every_rank_as_many_micro_batches(rows: int, micro_batch: int, extra: int) -> None:
    count = max(1, -(-rows // micro_batch)) + extra
    filled = fill_up(np.arange(rows), micro_batch, count)
    assert -(-len(filled) // micro_batch) == count
    assert filled[:rows].tolist() == list(range(rows))
    assert (filled[rows:] == NOBODY).all() and filled.dtype == np.int64


@pytest.mark.parametrize(
    ("rows", "micro_batch", "count", "added"), [(4, 2, 2, 0), (3, 2, 2, 0), (2, 2, 2, 1), (0, 2, 1, 1), (0, 4, 3, 9)]
)
def test_filling_up_adds_no_more_than_it_must(rows: int, micro_batch: int, count: int, added: int) -> None:
    assert len(fill_up(np.arange(rows), micro_batch, count)) == rows + added


def test_nobody_is_a_row_without_targets() -> None:
    [full, empty] = micro_batches(Counting([], 8, PAD), np.array([1, NOBODY, NOBODY]), 2)
    assert full["input_ids"].tolist() == [[1, 2], [PAD, PAD]]
    assert full["labels"].tolist() == [[2, 3], [-100, -100]]
    assert empty["labels"].tolist() == [[-100]]
    assert empty["attention_mask"].tolist() == [[1]]  # attention over nothing at all would be undefined


def test_the_rest_of_the_package_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raymodels.data, raymodels.data.prepare, raymodels.data.order\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'tokenizers', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
