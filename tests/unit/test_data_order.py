import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymodels.data.order import digest, sample_ids, shard

SEEDS = st.integers(0, 2**31 - 1)


def epoch_of(seed: int, epoch: int, samples: int) -> np.ndarray:
    return sample_ids(seed, epoch, samples, samples)


@given(seed=SEEDS, epoch=st.integers(0, 10**6), samples=st.integers(1, 3000))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, samples: int) -> None:
    assert sorted(epoch_of(seed, epoch, samples)) == list(range(samples))


@given(seed=SEEDS, epoch=st.integers(0, 10**6), samples=st.integers(30, 3000))
def test_epochs_and_seeds_differ(seed: int, epoch: int, samples: int) -> None:
    ids = epoch_of(seed, epoch, samples)
    assert (ids != epoch_of(seed, epoch + 1, samples)).any()
    assert (ids != epoch_of(seed + 1, epoch, samples)).any()


@given(seed=SEEDS, batch=st.integers(1, 40), samples=st.integers(1, 100))
def test_steps_join_into_epochs_whatever_the_batch(seed: int, batch: int, samples: int) -> None:
    steps = -(-2 * samples // batch)
    joined = np.concatenate([sample_ids(seed, step, batch, samples) for step in range(steps)])[: 2 * samples]
    assert (joined == np.concatenate([epoch_of(seed, 0, samples), epoch_of(seed, 1, samples)])).all()


@given(seed=SEEDS, batch=st.integers(1, 40), world=st.integers(1, 50))
def test_ranks_partition_the_batch_in_order(seed: int, batch: int, world: int) -> None:
    ids = sample_ids(seed, 3, batch, 1000)
    slices = [shard(ids, rank, world) for rank in range(world)]
    assert np.concatenate([mine for mine, _ in slices]).tolist() == ids.tolist()
    assert np.concatenate([places for _, places in slices]).tolist() == list(range(batch))
    sizes = [len(mine) for mine, _ in slices]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == -(-batch // world)


@pytest.mark.parametrize(
    ("batch", "world", "sizes"), [(8, 3, [3, 3, 2]), (8, 5, [2, 2, 2, 2, 0]), (1, 3, [1, 0, 0]), (8, 4, [2, 2, 2, 2])]
)
def test_slices_may_be_uneven(batch: int, world: int, sizes: list[int]) -> None:
    assert [len(shard(np.arange(batch), rank, world)[0]) for rank in range(world)] == sizes


@given(seed=SEEDS, step=st.integers(0, 10**6), batch=st.integers(1, 40), world=st.integers(1, 9))
def test_the_digests_of_slices_add_up(seed: int, step: int, batch: int, world: int) -> None:
    ids = sample_ids(seed, step, batch, 1000)
    parts = [digest(*shard(ids, rank, world)) for rank in range(world)]
    assert sum(parts) % 2**64 == digest(*shard(ids, 0, 1))


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=40, unique=True), st.data())
def test_the_digest_finds_a_lost_a_repeated_an_exchanged_and_another_sample(
    drawn: list[int], data: st.DataObject
) -> None:
    ids, places = np.array(drawn), np.arange(len(drawn))
    whole = digest(ids, places)
    one, other = data.draw(st.permutations(range(len(drawn))))[:2]
    exchanged, repeated, another = ids.copy(), ids.copy(), ids.copy()
    exchanged[[one, other]] = ids[[other, one]]
    repeated[one] = ids[other]
    another[one] += 1 << data.draw(st.integers(0, 40))
    for wrong in (exchanged, repeated, another):
        assert digest(wrong, places) != whole
    assert digest(np.delete(ids, one), np.delete(places, one)) != whole


def test_the_digest_is_fixed_for_good() -> None:
    # Digests in the record of a run are compared with those of its resume by a later version.
    assert f"{digest(*shard(sample_ids(17, 0, 8, 1000), 0, 1)):016x}" == "87b99517bc7e663b"
    assert digest(np.array([], np.int64), np.array([], np.int64)) == 0


def test_order_is_fixed_for_good() -> None:
    # A run that is resumed by a later version must see the samples it would have seen.
    assert sample_ids(17, 0, 8, 1000).tolist() == [96, 270, 549, 824, 279, 393, 645, 160]
    assert sample_ids(17, 10**7, 4, 10**9).tolist() == [61514367, 473039241, 374804750, 403726628]


def test_order_is_spread_out() -> None:
    ids = epoch_of(17, 0, 10_000)
    assert abs(np.corrcoef(np.arange(10_000), ids)[0, 1]) < 0.03
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    quarters = np.histogram2d(np.arange(10_000), ids, bins=4)[0]
    assert np.abs(quarters - 625).max() < 100


@pytest.mark.parametrize("samples", [10**4, 10**9])
def test_entering_late_takes_no_longer(samples: int) -> None:
    def fastest(step: int) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            sample_ids(17, step, 256, samples)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(10**7) < 3 * fastest(10)
