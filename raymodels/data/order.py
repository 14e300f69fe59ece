"""Which samples make up which global step: a pure function of the seed and the step. It knows nothing of ranks.

Each epoch visits the samples in the order of a pseudo-random permutation that is computed, not stored: a balanced
Feistel network over the smallest even number of bits that can count the samples (M. Luby and C. Rackoff, "How to
construct pseudorandom permutations from pseudorandom functions", SIAM J. Comput. 17(2), 1988), whose results outside
the range are fed in again until they fall inside, "cycle walking" (J. Black and P. Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002). The domain is under four times the samples, so that takes under four rounds on average.
The round function is the mixer of SplitMix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014). Nothing here is secret.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

ROUNDS = 8  # four suffice in theory for large domains; small ones need more


def sample_ids(seed: int, step: int, global_batch: int, samples: int) -> Ids:
    """The sample ids of one global step, shape [global_batch]; the batch may reach into the next epoch.

    Takes the same time at any step. ``step * global_batch`` and ``samples`` must be below 2^62.
    """
    assert seed >= 0 and step >= 0 and global_batch > 0 and samples > 0
    position = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.uint64)
    epoch, index = np.divmod(position, np.uint64(samples))
    return _permute(index, _keys(seed, epoch), samples).astype(np.int64)


def shard(ids: Ids, rank: int, world_size: int) -> tuple[Ids, Ids]:
    """The slice of a step's ids that one data-parallel rank takes, and their places in the step.

    Slices are equal where the ranks divide the batch; otherwise the last ones are shorter, perhaps empty.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    size = -(-len(ids) // world_size)
    places = np.arange(len(ids), dtype=np.int64)
    return ids[rank * size : (rank + 1) * size], places[rank * size : (rank + 1) * size]


def digest(ids: Ids, places: Ids) -> int:
    """A checksum modulo 2^64 of which sample stands at which place of a step.

    It adds up: the sum over any slices of a step is the digest of the whole step, whoever had which slice.
    """
    mixed = _mix(_mix(places.astype(np.uint64)) ^ ids.astype(np.uint64))
    return int(mixed.sum(dtype=np.uint64))


def _permute(index: Words, keys: Words, samples: int) -> Words:
    half_bits = np.uint64(max(1, -(-(samples - 1).bit_length() // 2)))
    result = _feistel(index, keys, half_bits)
    while (outside := result >= samples).any():
        result[outside] = _feistel(result[outside], keys[:, outside], half_bits)
    return result


def _feistel(value: Words, keys: Words, half_bits: np.uint64) -> Words:
    """A bijection of [0, 2^(2 half_bits)), one per column of keys; shape and dtype are kept."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _keys(seed: int, epoch: Words) -> Words:
    """One round key per round and position, shape [ROUNDS, positions]."""
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
    return _mix(_mix(_mix(np.full_like(epoch, seed)) ^ epoch) ^ rounds)


def _mix(value: Words) -> Words:
    """SplitMix64: the bits of each output depend on all bits of its input. Products wrap around, as they should."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
