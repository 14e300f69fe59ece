"""List, cut and read text and JSON Lines files."""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raymodels import storage
from raymodels.config import DataConfig
from raymodels.data.units import Document, Kind, Part, checked, decode
from raymodels.errors import DataError, StorageError

# What a file system may call a file's version, the most exact first.
STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class File:
    """A file of the source. ``stamp`` changes when its content may have."""

    uri: str
    name: str
    size: int
    stamp: str


def list_files(source: str) -> list[File]:
    """The files of a path, folder (hidden ones left out) or glob, sorted by name relative to it.

    Raises:
        DataError: there is none, or it cannot be listed.
    """
    place = storage.absolute(source)
    # A remote driver raises what it likes: botocore's NoCredentialsError is no OSError.
    with reading(f"source {source}", *([] if storage.is_local(place) else [Exception])):
        fs, path = storage.filesystem(place)
        if is_glob(source):
            base = posixpath.dirname(path[: min(path.index(sign) for sign in "*?[" if sign in path)])
            found = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
        elif fs.isdir(path):
            base, found = path, _below(fs, place, path)
            found = {name: info for name, info in found.items() if not _hidden(posixpath.relpath(name, base))}
        elif fs.exists(path):
            base, found = posixpath.dirname(path), {path: fs.info(path)}
        else:
            raise DataError(f"source {source} does not exist: give a file, folder or glob")
    if not found:
        raise DataError(f"source {source} {'matches' if is_glob(source) else 'holds'} no files")
    entries = [_file(fs, path, posixpath.relpath(path, base), info) for path, info in found.items()]
    return sorted(entries, key=lambda file: file.name)


def list_stdlib() -> list[File]:
    """The library source of the running interpreter, without installed packages, stamped by its content.

    A few of its tests are deliberately written in other encodings or broken ones; they are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        data = path.read_bytes()
        if not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or not _is_utf8(data):
            continue
        files.append(File(str(path), name, len(data), hashlib.sha256(data).hexdigest()))
    if not files:
        raise DataError(f"source python-stdlib: Python {sys.version.split()[0]} has no library source in {root}")
    return sorted(files, key=lambda file: file.name)


def kind_of(file: File, data: DataConfig) -> Kind:
    if data.format != "auto":
        return data.format
    return next((kind for suffix, kind in SUFFIXES.items() if file.name.endswith(suffix)), "text")


def parts(file: File, kind: Kind, limit: int) -> Iterator[Part]:
    """A text file is one part; JSON Lines are cut every ``limit`` bytes, unless they are compressed."""
    step = limit if kind == "jsonl" and not file.name.endswith(".gz") else max(file.size, 1)
    for start in range(0, file.size, step):
        stop = min(start + step, file.size)
        yield Part(kind, file.uri, file.name, start, stop, stop - start)


def read_text(part: Part, data: DataConfig) -> Iterator[Document]:
    """The one document that a text file is."""
    with reading(part.uri):
        content = storage.read_bytes(part.uri)
    if len(content) != part.size:
        raise DataError(f"{part.uri} has changed since it was listed: prepare again when it is complete")
    yield Document(part.name, decode(content, part.uri))


def read_jsonl(part: Part, data: DataConfig) -> Iterator[Document]:
    """The documents of the lines that begin inside the part."""
    for offset, line in _lines(part):
        if line.strip():
            try:
                text = _field(line, data.text_field)
            except DataError as error:
                raise DataError(f"{part.uri} line {_line_number(part, offset)}{error}") from error
            yield Document(f"{part.name}#{offset}", text)


def is_glob(source: str) -> bool:
    return any(sign in source for sign in "*?[")


@contextmanager
def reading(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of storage, and the given ones of a library, into a DataError that names what was read."""
    expected: tuple[type[Exception], ...] = (OSError, EOFError, StorageError, *errors)
    try:
        yield
    except DataError:
        raise
    except expected as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {what}: {reason}") from error


def _file(fs: Any, path: str, name: str, info: dict[str, Any]) -> File:
    uri = path if "file" in fs.protocol else fs.unstrip_protocol(path)
    return File(uri, name, info["size"], str(next(info[key] for key in STAMPS if key in info)))


def _below(fs: Any, place: str, path: str) -> dict[str, dict[str, Any]]:
    """Every file of a folder. On a disk fsspec's ``find`` would leave out what it fails to list, without a word."""
    if not storage.is_local(place):
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
        return found
    files = (posixpath.join(path, name) for name in storage.walk(place))
    return {file: fs.info(file) for file in files}


def _hidden(relative: str) -> bool:
    return any(piece.startswith(".") for piece in relative.split("/"))


def _is_utf8(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each line whose first byte lies in the part."""
    with reading(part.uri), _open(part) as file:
        offset = part.start
        if part.start:
            # A line may begin exactly at start: it does if the byte before it ends one.
            file.seek(part.start - 1)
            offset += len(file.readline()) - 1
        while (offset < part.stop or part.uri.endswith(".gz")) and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _open(part: Part) -> IO[bytes]:
    file = storage.open_file(part.uri)
    return gzip.GzipFile(fileobj=file) if part.uri.endswith(".gz") else file  # type: ignore[return-value]


def _line_number(part: Part, offset: int) -> int:
    with _open(part) as file:
        number, position = 1, 0
        while position < offset:
            position += len(file.readline())
            number += 1
    return number


def _field(line: bytes, field: str) -> str:
    text = decode(line, "")
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f" is not JSON: {error}") from error
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else "it is not an object"
        raise DataError(f" has no field {field} ({keys}): set data.text_field")
    if not isinstance(row[field], str):
        raise DataError(f": field {field} is {type(row[field]).__name__}, not text")
    return checked(row[field], f": field {field}")
