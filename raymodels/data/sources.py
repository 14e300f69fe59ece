"""`data.source` -> units of work -> documents.

The units are cut from the input alone, never from the number of workers, so what is prepared from them is the same
bytes wherever it is prepared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raymodels.config import DataConfig
from raymodels.data import files, tables
from raymodels.data.units import Document, Kind, Part, Unit, group, unit_bytes
from raymodels.errors import DataError

STDLIB = "python-stdlib"
SAMPLED_UNITS = 256  # at most twice as many are opened to train a tokenizer
READERS: dict[Kind, Callable[[Part, DataConfig], Iterator[Document]]] = {
    "text": files.read_text,
    "jsonl": files.read_jsonl,
    "parquet": tables.read_parquet,
    "hf": tables.read_hf,
}


@dataclass(frozen=True)
class Plan:
    """The units of a source in order. ``identity`` changes when the content of the source may have."""

    units: list[Unit]
    identity: str


def plan(data: DataConfig) -> Plan:
    """List a source and cut it into units, reading none of its documents.

    Raises:
        DataError: a source is missing, empty or unreadable, or lacks ``data.text_field``; it is named.
    """
    found: list[Part] = []
    identities: list[object] = []
    for position, source in enumerate([data.source] if isinstance(data.source, str) else data.source):
        identity, parts = _parts_of(source, data)
        if not any(part.size for part in parts):
            raise DataError(f"source {source} is empty")
        identities.append(identity)
        found += [dataclasses.replace(part, name=f"{position}:{part.name}") for part in parts]
    if not found:
        raise DataError("data.source is an empty list: name at least one source")
    digest = hashlib.sha256(json.dumps(identities).encode()).hexdigest()
    return Plan(group(found, unit_bytes(sum(part.size for part in found))), digest)


def documents(unit: Unit, data: DataConfig) -> Iterator[Document]:
    """The documents of one unit in order, without empty ones.

    Raises:
        DataError: one cannot be read or is not text; the file is named, and the line or row.
    """
    for part in unit.parts:
        for document in READERS[part.kind](part, data):
            if document.text:
                yield document


def sample(units: list[Unit], data: DataConfig, limit: int) -> Iterator[str]:
    """Up to about ``limit`` bytes of the documents that are not held out, spread evenly over all units."""
    step = max(1, len(units) // SAMPLED_UNITS)
    chosen = units[::step]
    total = sum(unit.size for unit in chosen)
    for unit in chosen:
        yield from _beginning(unit, data, limit * unit.size // max(total, 1))


def _beginning(unit: Unit, data: DataConfig, limit: int) -> Iterator[str]:
    for document in documents(unit, data):
        if limit <= 0:
            return
        if document.draw >= data.eval_fraction:
            yield document.text[:limit]
            limit -= len(document.text.encode())


def _parts_of(source: str, data: DataConfig) -> tuple[object, list[Part]]:
    if source.startswith("hf:"):
        fingerprint, parts = tables.hf_parts(source, data)
        return [source, data.hf_config, data.hf_split, fingerprint], parts
    if source == STDLIB:
        listed = files.list_stdlib()
        identity: list[object] = [STDLIB, platform.python_version(), [(f.name, f.size, f.stamp) for f in listed]]
        return identity, [part for file in listed for part in files.parts(file, "text", file.size)]
    listed = files.list_files(source)
    limit = unit_bytes(sum(file.size for file in listed))
    return [dataclasses.astuple(f) for f in listed], [part for f in listed for part in _parts(f, data, limit)]


def _parts(file: files.File, data: DataConfig, limit: int) -> Iterator[Part]:
    kind = files.kind_of(file, data)
    return tables.parquet_parts(file, data) if kind == "parquet" else files.parts(file, kind, limit)
