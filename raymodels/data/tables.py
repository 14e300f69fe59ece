"""Cut and read Parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from raymodels import storage
from raymodels.config import DataConfig
from raymodels.data.files import File, reading
from raymodels.data.units import Document, Part, checked, unit_bytes
from raymodels.errors import DataError

ROWS_AT_ONCE = 1000


def parquet_parts(file: File, data: DataConfig) -> Iterator[Part]:
    """One part per row group.

    Raises:
        DataError: it is not a Parquet file, or has no column of strings called ``data.text_field``.
    """
    import pyarrow as pa

    with _opened(file.uri) as table:
        metadata, schema = table.metadata, table.schema_arrow
    if data.text_field not in schema.names:
        known = ", ".join(schema.names)
        raise DataError(f"{file.uri} has no column {data.text_field} ({known}): set data.text_field")
    kind = schema.field(data.text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{file.uri}: column {data.text_field} is {kind}, not text: set data.text_field")
    for number in range(metadata.num_row_groups):
        yield Part("parquet", file.uri, file.name, number, number + 1, metadata.row_group(number).total_byte_size)


def read_parquet(part: Part, data: DataConfig) -> Iterator[Document]:
    """The documents of the part's row groups; only the one column is read."""
    field = data.text_field
    with _opened(part.uri) as table:
        row = sum(table.metadata.row_group(number).num_rows for number in range(part.start))
        groups = list(range(part.start, part.stop))
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[field]):
            yield from _rows(batch.column(0).to_pylist(), row, part, field)
            row += len(batch)


def hf_parts(source: str, data: DataConfig) -> tuple[str, list[Part]]:
    """The fingerprint of a Hugging Face dataset, and its parts.

    Raises:
        DataError: it cannot be loaded, or has no column of strings called ``data.text_field``.
    """
    dataset = _hf_dataset(source, data.hf_config, data.hf_split)
    field = data.text_field
    if field not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise DataError(f"source {source} has no column {field} ({known}): set data.text_field")
    if getattr(dataset.features[field], "dtype", "") not in ("string", "large_string", "string_view"):
        raise DataError(f"source {source}: column {field} is not text: set data.text_field")
    total = dataset.data.nbytes
    row_bytes = max(1, total // max(1, dataset.data.num_rows))
    step = max(1, unit_bytes(total) // row_bytes)
    parts = []
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        parts.append(Part("hf", source, data.hf_split, start, stop, (stop - start) * row_bytes))
    return dataset._fingerprint, parts


def read_hf(part: Part, data: DataConfig) -> Iterator[Document]:
    """The documents of the part's rows."""
    dataset = _hf_dataset(part.uri, data.hf_config, data.hf_split).select_columns([data.text_field])
    for start in range(part.start, part.stop, ROWS_AT_ONCE):
        texts = dataset[start : min(start + ROWS_AT_ONCE, part.stop)][data.text_field]
        yield from _rows(texts, start, part, data.text_field)


def _rows(texts: list[str | None], first: int, part: Part, field: str) -> Iterator[Document]:
    for row, text in enumerate(texts, first):
        if text is None:
            raise DataError(f"{part.uri} row {row}: field {field} is null, not text")
        yield Document(f"{part.name}#{row}", checked(text, f"{part.uri} row {row}: field {field}"))


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(uri, pa.ArrowException), storage.open_file(uri) as handle:
        yield pq.ParquetFile(handle)


@lru_cache(4)
def _hf_dataset(source: str, config: str | None, split: str) -> Any:
    """A split of a dataset on the hub, of a folder that ``save_to_disk`` wrote, or of a folder of data files."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    name = source.removeprefix("hf:")
    with reading(f"source {source}", ValueError, DatasetsError):
        place = storage.absolute(name)
        if storage.exists(storage.join(place, "dataset_dict.json")):
            splits = datasets.load_from_disk(place)
            if split not in splits:
                raise DataError(f"source {source} has no split {split} ({', '.join(splits)}): set data.hf_split")
            return splits[split]
        if storage.exists(storage.join(place, "state.json")):
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place if storage.exists(place) else name, config, split=split)
