"""What a manifest vouches for, and that nothing gets past it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymodels import manifest, storage
from raymodels.errors import IntegrityError

FILES = {"a.bin": b"first content", "deep/b.bin": b"second", "deep/empty": b""}


@pytest.fixture
def committed(place: str) -> str:
    return commit(place)


def commit(place: str) -> str:
    for name, content in FILES.items():
        storage.write_bytes(storage.join(place, name), content)
    manifest.commit(place, manifest.describe(place))
    return place


def test_a_committed_folder_is_what_it_was(committed: str) -> None:
    entries = manifest.verify(committed)
    assert entries == manifest.read(committed)
    assert {name: entry["size"] for name, entry in entries.items()} == {k: len(v) for k, v in FILES.items()}


def test_without_a_manifest_there_is_nothing(place: str) -> None:
    storage.write_bytes(f"{place}/a.bin", b"1")
    assert not manifest.is_committed(place)
    for call in (manifest.read, manifest.verify, manifest.digest):
        with pytest.raises(IntegrityError, match=rf"{place} has no MANIFEST\.json: it was never committed"):
            call(place)


def test_a_missing_file_is_named(committed: str) -> None:
    storage.delete(f"{committed}/deep/b.bin")
    with pytest.raises(IntegrityError, match=rf"{committed}/deep/b\.bin is missing"):
        manifest.verify(committed)


def test_a_resized_file_is_named(committed: str) -> None:
    storage.append(f"{committed}/a.bin", b"!")
    with pytest.raises(IntegrityError, match=rf"{committed}/a\.bin has 14 bytes, not 13"):
        manifest.verify(committed)


def test_a_changed_file_is_named(committed: str) -> None:
    storage.write_bytes(f"{committed}/a.bin", b"First content")
    with pytest.raises(IntegrityError, match=rf"{committed}/a\.bin was changed"):
        manifest.verify(committed)


def test_a_file_beside_the_recorded_ones_is_ignored(committed: str) -> None:
    before = manifest.digest(committed)
    storage.write_bytes(f"{committed}/other", b"1")
    manifest.verify(committed)
    assert manifest.digest(committed) == before


def test_several_processes_share_the_reading(committed: str) -> None:
    storage.write_bytes(f"{committed}/deep/b.bin", b"sECond")
    manifest.verify(committed, share=(0, 2))
    with pytest.raises(IntegrityError, match=r"b\.bin was changed"):
        manifest.verify(committed, share=(1, 2))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": {"size": 1}}}']
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / manifest.FILE).write_text(content)
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json is not a manifest"):
        manifest.verify(str(tmp_path))


def test_a_manifest_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE).write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match="is not a manifest"):
        manifest.read(str(tmp_path))


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = commit(str(tmp_path / "one")), commit(str(tmp_path / "other"))
    assert manifest.digest(one) == manifest.digest(other)
    storage.write_bytes(f"{other}/a.bin", b"else")
    manifest.commit(other, manifest.describe(other))
    assert manifest.digest(one) != manifest.digest(other)


@settings(max_examples=30)
@given(st.sampled_from([name for name, content in FILES.items() if content]), st.data())
def test_any_changed_byte_is_found(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _replace_a_byte(Path(commit(folder)) / name, data)
        with pytest.raises(IntegrityError, match=f"{name} was changed"):
            manifest.verify(folder)


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_of_the_manifest_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _replace_a_byte(Path(commit(folder)) / manifest.FILE, data)
        with pytest.raises(IntegrityError):
            manifest.verify(folder)


def _replace_a_byte(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
