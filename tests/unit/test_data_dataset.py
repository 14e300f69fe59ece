import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymodels.data import shards
from raymodels.data.dataset import FORMAT, Split, open_prepared
from raymodels.errors import DataError, IntegrityError

END = 0
SHARDS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=5)


def prepared(place: Path, lengths: list[list[int]], dtype: str = "<u2") -> tuple[Path, list[np.ndarray]]:
    """A prepared dataset of documents with the given token counts, shard by shard, and its documents."""
    documents, entries, token = [], [], 1
    for number, shard in enumerate(lengths):
        here = []
        for length in shard:
            here.append(np.array([*range(token, token + length - 1), END], dtype))
            token += length
        entries.append(shards.write(str(place), f"train-{number:05d}.bin", here, np.dtype(dtype)))
        documents += here
    manifest = {"format": FORMAT, "fingerprint": "f", "dtype": np.dtype(dtype).name, "pad_id": END, "vocab_size": token}
    manifest["splits"] = {"train": {"shards": entries}, "eval": {"shards": []}}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place, documents


def samples(split: Split) -> list[list[int]]:
    return [split.sample(index).tolist() for index in range(len(split))]


@settings(max_examples=60)
@given(lengths=SHARDS, seq_len=st.integers(2, 20))
def test_packed_targets_appear_once_and_in_order(tmp_path_factory, lengths: list[list[int]], seq_len: int) -> None:
    place, documents = prepared(tmp_path_factory.mktemp("p"), lengths)
    stream = np.concatenate(documents).tolist()
    if len(stream) < 2:
        return
    found = samples(open_prepared(str(place)).split("train", seq_len, True))
    assert [token for sample in found for token in sample[1:]] == stream[1:]
    assert all(len(sample) == seq_len + 1 for sample in found[:-1]) and 2 <= len(found[-1]) <= seq_len + 1
    assert all(before[-1] == after[0] for before, after in pairwise(found))


@settings(max_examples=60)
@given(lengths=SHARDS, seq_len=st.integers(2, 20))
def test_unpacked_samples_stay_in_their_document(tmp_path_factory, lengths: list[list[int]], seq_len: int) -> None:
    place, documents = prepared(tmp_path_factory.mktemp("p"), lengths)
    expected = [
        document[start : start + seq_len + 1].tolist()
        for document in documents
        for start in range(0, len(document) - 1, seq_len)
    ]
    if expected:
        assert samples(open_prepared(str(place)).split("train", seq_len, False)) == expected


def test_large_vocabularies(tmp_path) -> None:
    place, documents = prepared(tmp_path, [[60_000, 10_000]], "<u4")
    split = open_prepared(str(place)).split("train", 100, True)
    assert split.sample(len(split) - 1)[-2] == documents[-1][-2] > 65_536
    assert split.sample(0).dtype == np.int64
    assert (shards.dtype_for(65_536), shards.dtype_for(65_537)) == (np.dtype("<u2"), np.dtype("<u4"))


@pytest.mark.parametrize("pack", [True, False])
def test_split_without_samples(tmp_path, pack: bool) -> None:
    place, _ = prepared(tmp_path, [[1]])
    for name in ("train", "eval"):
        with pytest.raises(DataError, match=f"the {name} split of .* has no samples"):
            open_prepared(str(place)).split(name, 8, pack)


def test_index_out_of_range(tmp_path) -> None:
    split = open_prepared(str(prepared(tmp_path, [[9]])[0])).split("train", 4, True)
    for index in (-1, len(split)):
        with pytest.raises(IndexError):
            split.sample(index)


def test_damage_is_named(tmp_path) -> None:
    place, _ = prepared(tmp_path, [[9], [9]])
    shard = place / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"train-00001\.bin has \d+ bytes, not \d+"):
        open_prepared(str(place)).split("train", 4, True)
    shard.unlink()
    with pytest.raises(IntegrityError, match=r"train-00001\.bin is missing"):
        open_prepared(str(place)).split("train", 4, True)


def test_only_a_manifest_makes_it_prepared(tmp_path) -> None:
    place, _ = prepared(tmp_path, [[9]])
    (place / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match="has format 0, not 1"):
        open_prepared(str(place))
    (place / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a prepared dataset"):
        open_prepared(str(place))


@pytest.mark.parametrize("pack", [True, False])
def test_a_shard_that_changes_while_in_use_is_named_with_the_sample(tmp_path: Path, pack: bool) -> None:
    place, _ = prepared(tmp_path, [[9], [9]])
    split = open_prepared(str(place)).split("train", 4, pack)
    shard, last = place / "train-00001.bin", len(split) - 1
    whole = shard.read_bytes()
    assert len(split.sample(last)) >= 2
    shard.write_bytes(whole[:8])
    with pytest.raises(DataError, match=rf"train-00001\.bin has 8 bytes, not {len(whole)}, at sample {last}"):
        split.sample(last)
    shard.write_bytes(whole[:8] + b"\xff" * (len(whole) - 8))
    with pytest.raises(DataError, match=rf"train-00001\.bin holds token id 65535 at sample {last}.* has 19"):
        split.sample(last)
    shard.unlink()
    with pytest.raises(DataError, match=rf"train-00001\.bin was removed while in use, at sample {last}"):
        split.sample(last)
    assert split.sample(0)[0] == 1
