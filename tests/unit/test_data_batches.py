import subprocess
import sys

import numpy as np
import torch

from raymodels.data.batches import collate, micro_batches
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


def test_the_rest_of_the_package_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raymodels.data, raymodels.data.prepare, raymodels.data.order\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'tokenizers', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
