"""Reading and writing on a disk and on a real S3 server."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymodels import storage
from raymodels.errors import AlreadyExists, StorageError

WRITERS = 8


def test_what_is_written_is_read_back(place: str) -> None:
    file = f"{place}/a/b.bin"
    assert not storage.exists(file)
    storage.write_bytes(file, b"first")
    storage.write_bytes(file, b"second")
    assert storage.exists(file) and storage.read_bytes(file) == b"second"
    assert storage.sha256(file) == "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"


def test_a_range_is_read_whole_or_not_at_all(place: str) -> None:
    file = f"{place}/a"
    storage.write_bytes(file, bytes(range(256)))
    assert storage.read_range(file, 0, 256) == bytes(range(256))
    assert storage.read_range(file, 250, 6) == bytes(range(250, 256))
    assert storage.read_range(file, 7, 1) == b"\x07"
    for start, length in ((250, 7), (300, 1)):
        with pytest.raises(StorageError, match=f"cannot read {file}"):
            storage.read_range(file, start, length)
    with pytest.raises(StorageError, match=f"cannot read {place}/none"):
        storage.read_range(f"{place}/none", 0, 1)


def test_a_stream_replaces_what_was_there(place: str) -> None:
    file, pieces = f"{place}/new/folder/a", [bytes([number]) * 3_000_000 for number in range(4)]
    for count in (4, 1):
        with storage.create_stream(file) as stream:
            for piece in pieces[:count]:
                stream.write(memoryview(piece))
        assert storage.read_bytes(file) == b"".join(pieces[:count])
    assert storage.list_names(f"{place}/new/folder") == ["a"]


def test_a_stream_that_cannot_be_written_is_named(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "full").symlink_to("/dev/full")
    for place in (f"{tmp_path}/file/x", f"{tmp_path}/full", "s3://no-such-bucket/x"):
        with pytest.raises(StorageError, match=place), storage.create_stream(place) as stream:
            stream.write(b"1" * 100_000)


def test_what_is_streamed_survives_a_power_cut_with_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, set()

    def recording(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recording)
    with storage.create_stream(f"{tmp_path}/a/b/c") as stream:
        stream.write(b"1")
    assert synced == {(tmp_path / name).stat().st_ino for name in ("", "a", "a/b", "a/b/c")}


def test_what_is_copied_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, synced = os.fsync, set()

    def recording(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recording)
    (tmp_path / "a").write_bytes(b"1")
    storage.copy_file(f"{tmp_path}/a", f"{tmp_path}/copies/a")
    assert synced == {(tmp_path / name).stat().st_ino for name in ("", "copies", "copies/a")}


def test_json(place: str) -> None:
    value = {"b": [1, 2.5, None], "a": "naïve"}
    storage.write_json(f"{place}/x.json", value)
    assert storage.read_json(f"{place}/x.json") == value
    assert storage.read_bytes(f"{place}/x.json") == storage.to_json(value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"x\.json is not JSON"):
        storage.read_json(str(tmp_path / "x.json"))


def test_append_adds_at_the_end(place: str) -> None:
    for line in (b"one\n", b"two\n", b"three\n"):
        storage.append(f"{place}/log", line)
    assert storage.read_bytes(f"{place}/log") == b"one\ntwo\nthree\n"


def test_listing(place: str) -> None:
    assert storage.list_names(place) == [] and storage.walk(place) == {}
    for name, size in {"b": 2, "a/x": 1, "a/deep/y": 3}.items():
        storage.write_bytes(storage.join(place, name), b"." * size)
    assert storage.list_names(place) == storage.list_names(place + "/") == ["a", "b"]
    assert storage.walk(place) == storage.walk(place + "/") == {"a/deep/y": 3, "a/x": 1, "b": 2}


@pytest.mark.parametrize("call", [storage.exists, storage.walk, storage.list_names, storage.delete])
def test_what_does_not_answer_is_not_taken_for_absent(call: object, tmp_path: Path) -> None:
    """A disk that is away for a moment answers with an error; here a link that leads to itself does."""
    (tmp_path / "away").symlink_to(tmp_path / "away")
    with pytest.raises(StorageError, match=rf"{tmp_path}/away/x: .*Too many levels"):
        call(f"{tmp_path}/away/x")  # type: ignore[operator]


def test_a_folder_is_not_walked_in_part(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/b", b"1")
    (tmp_path / "away").symlink_to(tmp_path / "away")
    with pytest.raises(StorageError, match=f"cannot list {tmp_path}"):
        storage.walk(str(tmp_path))


def test_delete_takes_files_and_folders(place: str) -> None:
    for name in ("a/x", "a/y", "b"):
        storage.write_bytes(storage.join(place, name), b"1")
    storage.delete(f"{place}/a")
    assert storage.walk(place) == {"b": 1}
    storage.delete(f"{place}/b")
    storage.delete(f"{place}/b")
    assert not storage.exists(f"{place}/b")


def test_copies_between_kinds_of_storage(bucket: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # several pieces
    (tmp_path / "a").write_bytes(content)
    storage.copy_file(str(tmp_path / "a"), f"{bucket}/a")
    storage.copy_file(f"{bucket}/a", str(tmp_path / "new" / "b"))
    assert (tmp_path / "new" / "b").read_bytes() == content
    assert storage.sha256(f"{bucket}/a") == storage.sha256(str(tmp_path / "a"))


def test_one_of_several_creators_wins(place: str) -> None:
    barrier = threading.Barrier(WRITERS)

    def create(writer: int) -> int | None:
        barrier.wait()
        try:
            storage.create(f"{place}/taken", b"%d" % writer * 10_000)
        except AlreadyExists as error:
            assert str(error) == f"{place}/taken already exists"
            return None
        return writer

    with ThreadPoolExecutor(WRITERS) as pool:
        [winner] = [writer for writer in pool.map(create, range(WRITERS)) if writer is not None]
    assert storage.read_bytes(f"{place}/taken") == b"%d" % winner * 10_000
    assert storage.list_names(place) == ["taken"]


def test_a_creator_whose_answer_was_lost_on_nfs_has_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    storage.create(f"{tmp_path}/a", b"1")
    with pytest.raises(AlreadyExists):
        storage.create(f"{tmp_path}/a", b"2")
    assert storage.list_names(str(tmp_path)) == ["a"] and storage.read_bytes(f"{tmp_path}/a") == b"1"


def test_one_of_several_processes_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with context.Pool(4) as pool:
        outcomes = pool.starmap(_create_many, [(str(tmp_path), writer) for writer in range(4)])
    assert sorted(name for won in outcomes for name in won) == sorted(f"{number:02}" for number in range(50))
    for writer, won in enumerate(outcomes):
        assert all((tmp_path / name).read_bytes() == b"%d" % writer for name in won)


def _create_many(folder: str, writer: int) -> list[str]:
    won = []
    for number in range(50):
        try:
            storage.create(f"{folder}/{number:02}", b"%d" % writer)
            won.append(f"{number:02}")
        except AlreadyExists:
            continue
    return won


def test_a_reader_never_sees_a_part(place: str) -> None:
    file, versions = f"{place}/file", [bytes([number]) * 200_000 for number in range(15)]
    storage.write_bytes(file, versions[0])
    done = threading.Event()

    def read() -> int:
        seen = 0
        while not done.is_set() or not seen:
            assert storage.read_bytes(file) in versions
            seen += 1
        return seen

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for version in versions:
            storage.write_bytes(file, version)
        done.set()
        assert reader.result() > 0
    assert storage.list_names(place) == ["file"]


@pytest.mark.parametrize("place", ["gs://bucket/file", "nonsense://x/y"])
@pytest.mark.parametrize("call", ["exists", "read_bytes", "walk", "list_names", "delete", "sha256"])
def test_a_missing_driver_is_named_with_its_remedy(place: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place.startswith("gs"):
        _uninstalled("gcsfs", monkeypatch)
    remedy = r"pip install 'raymodels\[s3\]' or 'raymodels\[gs\]'" if place.startswith("gs") else "use a path, s3:// or"
    with pytest.raises(StorageError, match=rf"cannot open {place}: .*{remedy}"):
        getattr(storage, call)(place)


def _uninstalled(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def find(name: str, *rest: object) -> object:
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", find)


def test_errors_name_the_place(place: str) -> None:
    with pytest.raises(StorageError, match=f"cannot read {place}/none"):
        storage.read_bytes(f"{place}/none")
    with pytest.raises(StorageError, match=f"{place}/none"):
        storage.copy_file(f"{place}/none", f"{place}/other")


@pytest.mark.parametrize("call", [storage.write_bytes, storage.create, storage.append])
def test_a_place_that_cannot_be_written_is_named(call: object, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in (str(tmp_path / "file" / "x"), "s3://no-such-bucket/x"):
        with pytest.raises(StorageError, match=place) as raised:
            call(place, b"1")  # type: ignore[operator]
        assert not isinstance(raised.value, AlreadyExists)


def test_an_unreachable_store_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for call in (storage.list_names, storage.walk, storage.exists, storage.read_bytes):
            with pytest.raises(StorageError, match=f"{bucket}/x.*127.0.0.1:1"):
                call(f"{bucket}/x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_local_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert storage.name("s3://bucket/runs/") == "runs"
    for place in ("relative/x", f"file://{tmp_path}/uri/x", "~/x"):
        storage.write_bytes(place, b"1")
        assert storage.exists(place) and storage.exists(storage.absolute(place))
        storage.append(place, b"2")
        assert storage.read_bytes(place) == storage.local_path(place).read_bytes() == b"12"
    assert (tmp_path / "home" / "x").exists()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        storage.write_bytes(str(tmp_path / "folder"), b"1")
    with pytest.raises(AlreadyExists, match="folder already exists"):
        storage.create(str(tmp_path / "folder"), b"1")
    assert storage.list_names(str(tmp_path)) == ["folder"]
