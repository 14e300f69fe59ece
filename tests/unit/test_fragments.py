"""The digest of the training state: the same however the state is cut, another for any other state."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymodels.checkpoint import fragments as live
from raymodels.checkpoint.fragments import KINDS, Fragment, as_text, digest, own_share

SHAPE = (4, 5)
NUMEL = prod(SHAPE)
BITS = [1 << bit for bit in range(31)] + [-(1 << 31)]  # of a float32, the sign last


def whole(name: str = "layer.weight", seed: int = 3) -> Fragment:
    torch.manual_seed(seed)
    return Fragment(name, SHAPE, 0, {kind: torch.randn(NUMEL) for kind in KINDS})


def only(kind: str) -> Fragment:
    return Fragment("layer.weight", SHAPE, 0, {kind: whole().tensors[kind].clone()})


def part(fragment: Fragment, begin: int, end: int) -> Fragment:
    tensors = {kind: tensor[begin:end] for kind, tensor in fragment.tensors.items()}
    return Fragment(fragment.name, fragment.shape, fragment.start + begin, tensors)


def changed(fragment: Fragment, kind: str, tensor: torch.Tensor) -> Fragment:
    return Fragment(fragment.name, fragment.shape, fragment.start, {**fragment.tensors, kind: tensor})


@given(st.lists(st.integers(0, NUMEL), max_size=6))
def test_over_any_cutting_the_sum_is_the_same(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), NUMEL]
    parts = [part(whole(), begin, end) for begin, end in pairwise(bounds)]
    assert sum(map(digest, parts)) % 2**64 == digest(whole())
    assert sum(map(digest, reversed(parts))) % 2**64 == digest(whole())


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
def test_what_all_ranks_hold_is_shared_out_without_gap_or_overlap(world_size: int) -> None:
    shares = [own_share(whole(), rank, world_size) for rank in range(world_size)]
    assert [share.start for share in shares[1:]] == [share.start + share.numel for share in shares[:-1]]
    assert shares[0].start == 0 and sum(share.numel for share in shares) == NUMEL
    assert sum(map(digest, shares)) % 2**64 == digest(whole())
    joined = torch.cat([share.tensors["exp_avg"] for share in shares])
    assert torch.equal(joined, whole().tensors["exp_avg"])


def test_pieces_in_which_it_is_computed_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest(whole())
    for size in (1, 4, NUMEL - 1, NUMEL):
        monkeypatch.setattr(live, "CHUNK", size)
        assert digest(whole()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_bit_flip_is_found(kind: str) -> None:
    fragment = only(kind)
    expected, bits = digest(fragment), fragment.tensors[kind].view(torch.int32)
    for element in range(NUMEL):
        for bit in BITS:
            bits[element] ^= bit
            assert digest(fragment) != expected, (element, bit)
            bits[element] ^= bit
    assert digest(fragment) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_exchange_of_two_elements_is_found(kind: str) -> None:
    fragment = only(kind)
    expected, tensor = digest(fragment), fragment.tensors[kind]
    for one, other in combinations(range(NUMEL), 2):
        tensor[[one, other]] = tensor[[other, one]]
        assert digest(fragment) != expected, (one, other)
        tensor[[one, other]] = tensor[[other, one]]
    assert digest(fragment) == expected


@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, NUMEL - 1), st.sampled_from(BITS)), min_size=1, unique=True
    )
)
def test_several_bit_flips_are_found(flips: list[tuple[str, int, int]]) -> None:
    fragment = whole()
    for kind, element, bit in flips:
        fragment.tensors[kind].view(torch.int32)[element] ^= bit
    assert digest(fragment) != digest(whole())


def test_kinds_exchanged_are_found() -> None:
    fragment = whole()
    one, other = fragment.tensors["exp_avg"], fragment.tensors["exp_avg_sq"]
    assert digest(changed(changed(fragment, "exp_avg", other), "exp_avg_sq", one)) != digest(fragment)


def test_parameters_exchanged_are_found() -> None:
    one, other = whole("q_proj.weight", 3), whole("k_proj.weight", 4)
    exchanged = [
        Fragment(one.name, SHAPE, 0, other.tensors),
        Fragment(other.name, SHAPE, 0, one.tensors),
    ]
    assert sum(map(digest, exchanged)) % 2**64 != (digest(one) + digest(other)) % 2**64


def test_a_place_missed_by_one_is_found() -> None:
    fragment = part(whole(), 5, 10)
    moved = Fragment(fragment.name, SHAPE, fragment.start + 1, fragment.tensors)
    assert digest(moved) != digest(fragment)


def test_a_part_lost_or_counted_twice_is_found() -> None:
    parts = [part(whole(), begin, begin + 4) for begin in range(0, NUMEL, 4)]
    for number in range(len(parts)):
        assert sum(map(digest, parts[:number] + parts[number + 1 :])) % 2**64 != digest(whole())
        assert sum(map(digest, [*parts, parts[number]])) % 2**64 != digest(whole())


def test_the_two_zeros_differ_and_no_number_equals_itself() -> None:
    def of(values: list[float]) -> int:
        return digest(Fragment("x", (2,), 0, {"master": torch.tensor(values)}))

    assert of([0.0, 1.0]) != of([-0.0, 1.0])
    assert of([float("nan"), 1.0]) == of([float("nan"), 1.0]) != of([float("inf"), 1.0])


def test_the_digest_is_fixed_for_good() -> None:
    # A checkpoint must load in a later version, which compares its digest.
    known = Fragment(
        "layer.weight", (4,), 2, {"master": torch.tensor([1.0, -2.0]), "exp_avg": torch.tensor([0.5, 0.0])}
    )
    assert as_text(digest(known)) == "4de749284dd20014"
    assert as_text(2 * 2**64 + 10) == "000000000000000a"
