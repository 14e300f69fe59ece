"""One way to read, write, list and atomically publish files: local disk, NFS, s3://, gs://.

A place is a string: a path or a URI. The protocols are fsspec's; object stores need their driver installed
(``pip install 'raymodels[s3]'`` or ``'raymodels[gs]'``). Two guarantees carry everything above this module:

- `write_bytes` is atomic: a reader sees the old content or the new, never a part.
- `create` is atomic *and* exclusive: of several writers one wins and the others get `AlreadyExists`.
  Compare-and-swap in the registry is built on this alone, so it holds wherever `create` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from raymodels.errors import AlreadyExists, StorageError

CHUNK = 4 << 20


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    assert is_local(uri), uri
    return Path(uri.removeprefix("file://")).expanduser()


def absolute(uri: str) -> str:
    """The place with a relative local path made absolute, so that it means the same in every process."""
    return str(local_path(uri).absolute()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    return posixpath.join(uri, *parts)


def name(uri: str) -> str:
    return posixpath.basename(uri.rstrip("/"))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a place and the path in it.

    Raises:
        StorageError: the protocol is unknown or its driver is not installed.
    """
    try:
        # Listings of object stores are never cached: another process may have written since.
        options = {} if is_local(uri) else {"use_listings_cache": False}
        fs, path = url_to_fs(uri, **options)
    except ImportError as error:
        raise StorageError(f"cannot open {uri}: {error} (pip install 'raymodels[s3]' or 'raymodels[gs]')") from error
    except ValueError as error:
        raise StorageError(f"cannot open {uri}: {error}; use a path, s3:// or gs://") from error
    return fs, path


def exists(uri: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: it cannot be told, as storage does not answer; a file must not be taken for gone then.
    """
    fs, path = filesystem(uri)
    with _named("look for", uri):
        if not is_local(uri):
            return bool(fs.exists(path))
        try:
            Path(path).stat()  # fsspec, for one, takes every error for absence
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open one file; writing to a local path makes its folder.

    Raises:
        StorageError: the file is missing or cannot be opened.
    """
    fs, path = filesystem(uri)
    with _named("open", uri):
        if "r" not in mode and is_local(uri):
            _make_folder(Path(path).parent)
        handle: IO[Any] = fs.open(path, mode)
        return handle


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with _named("read", uri):
        data: bytes = fs.cat_file(path)  # one request: an opened object that is replaced meanwhile cannot be read on
        return data


def read_range(uri: str, start: int, length: int) -> bytes:
    """``length`` bytes of a file from byte ``start`` on.

    Raises:
        StorageError: the file is missing or shorter than that.
    """
    fs, path = filesystem(uri)
    with _named("read", uri):
        data: bytes = fs.cat_file(path, start=start, end=start + length)
    if len(data) != length:
        raise StorageError(f"cannot read {uri}: it ends before byte {start + length}")
    return data


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is not JSON: {error}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Replace one file atomically; on return it survives a power cut."""
    fs, remote = filesystem(uri)
    with _named("write", uri):
        if not is_local(uri):
            fs.pipe_file(remote, data)
            return
        path = local_path(uri)
        temporary = _write_beside(path, data)
        try:
            os.replace(temporary, path)
        except OSError:
            temporary.unlink()
            raise
        sync_folder(path.parent)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, to_json(value))


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def create(uri: str, data: bytes) -> None:
    """Write a file that must not be there yet, atomically and durably.

    Raises:
        AlreadyExists: somebody else has created it; its content is whole.
    """
    fs, remote = filesystem(uri)
    with _named("create", uri):
        if is_local(uri):
            _link(_write_beside(local_path(uri), data), local_path(uri))
            return
        try:
            fs.pipe_file(remote, data, mode="create")  # a conditional PUT on S3 and GCS
        except FileExistsError as error:
            raise AlreadyExists(f"{uri} already exists") from error


def append(uri: str, data: bytes) -> None:
    """Add to the end of a file with one writer. Object stores rewrite it, so keep it small there."""
    with _named("append to", uri), open_file(uri, "ab") as file:
        file.write(data)


@contextlib.contextmanager
def create_stream(uri: str) -> Iterator[IO[Any]]:
    """Write one file piece by piece, replacing what is there; on leaving it is whole and survives a power cut.

    For files that something else declares valid later: a reader may see a part of it meanwhile.
    """
    with _named("write", uri), open_file(uri, "wb") as file:
        yield file
        if is_local(uri):
            file.flush()
            os.fsync(file.fileno())
    if is_local(uri):
        sync_folder(local_path(uri).parent)


def list_names(uri: str) -> list[str]:
    """The names of the files and folders directly in a place, sorted; none if it does not exist."""
    fs, path = filesystem(uri)
    with _named("list", uri), contextlib.suppress(FileNotFoundError):
        return sorted(name(entry) for entry in fs.ls(path, detail=False))
    return []


def walk(uri: str) -> dict[str, int]:
    """Every file below a place: path relative to it -> size in bytes, sorted by path; none if it does not exist.

    Raises:
        StorageError: a part of it cannot be listed.
    """
    fs, root = filesystem(uri)
    with _named("list", uri):
        found = _files_below(root) if is_local(uri) else fs.find(root, detail=True)
    root = root.rstrip("/") + "/"
    return {path.removeprefix(root): info["size"] for path, info in sorted(found.items())}


def unseen(uri: str, sizes: Mapping[str, int]) -> str | None:
    """The place of the first file below one that is not to be seen from here in its size; none if all are.

    Args:
        sizes: path relative to the place -> size in bytes.
    """
    found = walk(uri)
    return next((join(uri, name) for name, size in sizes.items() if found.get(name) != size), None)


def delete(uri: str) -> None:
    """Remove a file or folder with all it holds; nothing happens if it is not there."""
    fs, path = filesystem(uri)
    if exists(uri):
        with _named("delete", uri):
            fs.rm(path, recursive=True)


def copy_file(source: str, target: str) -> None:
    """Copy one file as `create_stream` writes it: on return the copy survives a power cut."""
    with _named("copy", f"{source} to {target}"), open_file(source) as reader, create_stream(target) as writer:
        shutil.copyfileobj(reader, writer, CHUNK)


def sha256(uri: str) -> str:
    """The hex SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    for piece in _pieces(uri):
        digest.update(piece)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Make a local file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a local folder's entries (a rename, a new file) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(doing: str, place: str) -> Iterator[None]:
    """Turn what goes wrong into a `StorageError` that names the place."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # Drivers of object stores also raise their own libraries' errors, which are no OSErrors.
        if is_local(place) and not isinstance(error, OSError):
            raise
        raise StorageError(f"cannot {doing} {place}: {error or type(error).__name__}") from error


def _files_below(root: str) -> dict[str, dict[str, int]]:
    """As fsspec's ``find`` on a disk, which leaves out the folders that it fails to list."""
    found: dict[str, dict[str, int]] = {}
    for folder, _, names in os.walk(root, onerror=_unless_gone):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found[str(path)] = {"size": path.stat().st_size}
    return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_folder(path: Path) -> None:
    """Make a folder with those above it, so that it survives a power cut as what is written into it does."""
    if not path.exists():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def _write_beside(path: Path, data: bytes) -> Path:
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, link fails where the name is taken; also over NFS
    except FileExistsError as error:
        # An NFS client whose answer got lost asks again, and hears that the name is taken: by this very file.
        if temporary.stat().st_nlink == 1:
            raise AlreadyExists(f"{path} already exists") from error
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def _pieces(uri: str) -> Iterator[bytes]:
    with _named("read", uri), open_file(uri) as file:
        while piece := file.read(CHUNK):
            yield piece
