"""The files of a checkpoint: what is written comes back, by any range, from any storage, and only if it is whole."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from raymodels import manifest, storage
from raymodels.checkpoint import shards, tensors
from raymodels.checkpoint.fragments import KINDS, Fragment
from raymodels.checkpoint.shards import Shards
from raymodels.errors import CheckpointError, StorageError

SHAPES = {"embed": (7, 5), "norm": (3,), "head": (11, 4), "scale": ()}


def state() -> dict[str, dict[str, torch.Tensor]]:
    """Whole flat tensors by parameter and kind, different everywhere."""
    torch.manual_seed(3)
    return {name: {kind: torch.randn(prod(shape)) for kind in KINDS} for name, shape in SHAPES.items()}


def cut(state: dict[str, dict[str, torch.Tensor]], cuts: dict[str, list[int]]) -> list[list[Fragment]]:
    """The fragments of each rank: of each parameter those between its cuts."""
    ranks = []
    for rank in range(len(next(iter(cuts.values()))) - 1):
        ranks.append(
            [
                Fragment(name, SHAPES[name], at[rank], {k: t[at[rank] : at[rank + 1]] for k, t in state[name].items()})
                for name, at in cuts.items()
            ]
        )
    return ranks


def write(place: str, ranks: list[list[Fragment]]) -> None:
    entries = {}
    for rank, held in enumerate(ranks):
        name = shards.file_name(rank, len(ranks), "a")
        flat = {f"{kind}/{fragment.name}": t for fragment in held for kind, t in fragment.tensors.items()}
        entries[name] = tensors.write(storage.join(place, name), flat, shards.metadata(held))
    manifest.commit(place, entries)


def evenly(ranks: int) -> dict[str, list[int]]:
    return {name: [prod(shape) * rank // ranks for rank in range(ranks + 1)] for name, shape in SHAPES.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


ODD = [0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan")]


def test_a_file_comes_back_to_the_last_bit(place: str) -> None:
    file = storage.join(place, "some.safetensors")
    written = {"a": torch.tensor(ODD), "empty": torch.empty(0), "b": torch.arange(1000.0)}
    entry = tensors.write(file, written, {"about": {"a": [1, [2, 3]]}, "ü": None})
    data = storage.read_bytes(file)
    assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    found, metadata = tensors.read_header(file)
    assert metadata == {"about": {"a": [1, [2, 3]]}, "ü": None}
    assert list(found) == ["a", "empty", "b"]
    for name, tensor in written.items():
        byte, numel = found[name]
        assert same_bits(tensors.read([tensors.Piece(file, 0, numel, byte)], 0, numel), tensor)


def test_the_safetensors_library_reads_it_too(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    written = {"a": torch.tensor(ODD), "empty": torch.empty(0), "b": torch.arange(1000.0)}
    tensors.write(str(file), written, {"about": [1, 2]})
    found = load_file(file)
    assert found.keys() == written.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in written.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"about": "[1, 2]"}
        assert torch.equal(opened.get_slice("b")[10:20], torch.arange(10.0, 20.0))


def test_tensors_larger_than_a_buffer_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 64)
    written = {"a": torch.randn(1001), "b": torch.randn(16)}
    entry = tensors.write(str(tmp_path / "f"), written, {})
    assert entry == manifest.entry((tmp_path / "f").read_bytes())
    assert all(same_bits(load_file(tmp_path / "f")[name], tensor) for name, tensor in written.items())


def test_shards_make_one_state_again(place: str) -> None:
    whole = state()
    write(place, cut(whole, evenly(3)))
    found = Shards(place)
    assert found.shapes == SHAPES
    for name, kinds in whole.items():
        assert same_bits(found.weight(name), kinds["master"].view(SHAPES[name]))
        for kind, tensor in kinds.items():
            assert same_bits(found.read(kind, name, 0, tensor.numel()), tensor)


@settings(max_examples=30)
@given(data=st.data(), ranks=st.integers(1, 5))
def test_any_range_of_any_cutting_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ranks: int
) -> None:
    place, whole = str(tmp_path_factory.mktemp("any")), state()
    cuts = {
        name: [0, *sorted(data.draw(st.lists(st.integers(0, n), min_size=ranks - 1, max_size=ranks - 1))), n]
        for name, n in ((name, prod(shape)) for name, shape in SHAPES.items())
    }
    write(place, cut(whole, cuts))
    found = Shards(place)
    for name, kinds in whole.items():
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, prod(SHAPES[name]))] * 2)))
        for kind, tensor in kinds.items():
            assert same_bits(found.read(kind, name, begin, end - begin), tensor[begin:end])


def test_a_file_that_a_save_replaced_but_did_not_declare_is_not_read(place: str) -> None:
    whole = state()
    write(place, cut(whole, evenly(2)))
    stray = cut({name: {k: t + 1 for k, t in kinds.items()} for name, kinds in whole.items()}, evenly(3))
    for rank, held in enumerate(stray):  # of another save into the same folder, on another number of ranks
        flat = {f"{kind}/{fragment.name}": t for fragment in held for kind, t in fragment.tensors.items()}
        tensors.write(storage.join(place, shards.file_name(rank, 3, "a")), flat, shards.metadata(held))
    assert same_bits(Shards(place).weight("embed").view(-1), whole["embed"]["master"])


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([[0, 20], [21, 35]], r"holds master/embed with a gap or an overlap at element 20"),
        ([[0, 20], [19, 35]], r"holds master/embed with a gap or an overlap at element 19"),
        ([[0, 20], [0, 20], [20, 35]], r"holds master/embed with a gap or an overlap at element 0"),
        ([[1, 20], [20, 35]], r"holds master/embed with a gap or an overlap at element 0"),
        ([[0, 20], [20, 34]], r"holds 34 of 35 elements of master/embed"),
        ([[0, 20]], r"holds 20 of 35 elements of master/embed"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path: Path, cuts: list[list[int]], message: str) -> None:
    whole = state()["embed"]
    ranks = [
        [Fragment("embed", SHAPES["embed"], begin, {kind: t[begin:end] for kind, t in whole.items()})]
        for begin, end in cuts
    ]
    write(str(tmp_path), ranks)
    with pytest.raises(CheckpointError, match=message):
        Shards(str(tmp_path))


@pytest.mark.parametrize("content", [b"\x05" + bytes(7) + b"hello world", b"\x02" + bytes(7) + b"{}"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other is not a checkpoint's file"):
        tensors.read_header(str(tmp_path / "other"))


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" + bytes(7) + b"{}"])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cut").write_bytes(content)
    with pytest.raises(StorageError, match=r"cannot read .*cut: it ends before byte"):
        tensors.read_header(str(tmp_path / "cut"))


def test_a_range_beyond_the_file_is_refused(place: str) -> None:
    file = storage.join(place, "f")
    tensors.write(file, {"a": torch.zeros(10)}, {})
    [(byte, _)] = tensors.read_header(file)[0].values()
    with pytest.raises(StorageError, match="it ends before byte"):
        tensors.read([tensors.Piece(file, 0, 20, byte)], 0, 20)


def test_a_parameter_smaller_than_the_ranks_is_whole_in_whatever_order_the_files_were_read() -> None:
    """Of three ranks at stage 0, the last holds its one element. Two ranks that load it read every second file."""
    headers = {
        f"shard-{rank}": (
            {f"{kind}/scale": (8, numel) for kind in KINDS},
            {"fragments": {"scale": (0, (1,))}},
        )
        for rank, numel in ((0, 0), (2, 1), (1, 0))
    }
    assert Shards("place", headers).shapes == {"scale": (1,)}
