import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymodels.config import DataConfig
from raymodels.data import sources, units
from raymodels.errors import DataError

ROWS = [f"row {number}: naïve {'x' * (number % 50)}" for number in range(200)]


def texts(source: str | list[str], **settings: object) -> list[str]:
    data = DataConfig(source=source, seq_len=8, **settings)
    return [document.text for unit in sources.plan(data).units for document in sources.documents(unit, data)]


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return path


@pytest.fixture
def small_units(monkeypatch):
    """Cut sources into many units, as a large one is."""
    monkeypatch.setattr(units, "SMALLEST_UNIT", 100)
    monkeypatch.setattr(units, "LARGEST_UNIT", 100)


def test_file_folder_glob_and_list(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in [("b.txt", "B"), ("a.md", "A"), ("sub/c.txt", "C"), (".hidden", "H"), ("empty.txt", "")]:
        (tmp_path / name).write_text(text)
    assert texts(str(tmp_path)) == ["A", "B", "C"]
    assert texts(f"{tmp_path}/*.txt") == ["B"]
    assert texts(f"{tmp_path}/**/*.txt") == ["B", "C"]
    assert texts([f"{tmp_path}/b.txt", f"{tmp_path}/a.md"]) == ["B", "A"]


def test_relative_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A")
    assert texts("a.txt") == texts("./*.txt") == texts(".") == ["A"]


def test_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts(f"{tmp_path}/a.txt") == ["one\r\ntwo\n"]


@pytest.mark.parametrize("newline_at_end", [True, False])
def test_jsonl_lines_are_read_once_however_they_are_cut(tmp_path, small_units, newline_at_end: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    if not newline_at_end:
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    data = DataConfig(source=str(path), seq_len=8)
    assert len(sources.plan(data).units) > 50
    assert texts(str(path)) == ROWS


@pytest.mark.parametrize("limit", [7, 40, 41, 1000])
def test_cut_on_a_line_boundary(tmp_path, monkeypatch, limit: int) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT", limit)
    monkeypatch.setattr(units, "LARGEST_UNIT", limit)
    rows = [str(number) for number in range(100, 140)]
    assert texts(str(write_jsonl(tmp_path / "a.jsonl", rows))) == rows


def test_compressed_jsonl(tmp_path, small_units) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert texts(f"{tmp_path}/a.jsonl.gz") == ROWS


def test_format_and_field_can_be_set(tmp_path) -> None:
    write_jsonl(tmp_path / "a.data", ["A", "B"], "body")
    assert texts(f"{tmp_path}/a.data", format="jsonl", text_field="body") == ["A", "B"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_by_row_groups(tmp_path, small_units, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(ROWS).cast(kind), "other": list(range(len(ROWS)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    assert texts(f"{tmp_path}/a.parquet") == ROWS


@pytest.mark.parametrize("layout", ["saved", "saved_splits", "files"])
def test_hugging_face_folder(tmp_path, small_units, monkeypatch, layout: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = datasets.Dataset.from_dict({"text": ROWS})
    folder = tmp_path / "rows"
    if layout == "saved":
        dataset.save_to_disk(folder)
    elif layout == "saved_splits":
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", ROWS)
    assert texts(f"hf:{folder}") == ROWS


def test_python_stdlib_is_the_library_source() -> None:
    data = DataConfig(source="python-stdlib", seq_len=8)
    plan = sources.plan(data)
    names = [part.name for unit in plan.units for part in unit.parts]
    assert "0:argparse.py" in names and "0:json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name]
    assert plan == sources.plan(data)


def test_units_do_not_depend_on_where_the_source_lies(tmp_path, small_units) -> None:
    identities = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "a.jsonl", ROWS)
        data = DataConfig(source=str(tmp_path / place), seq_len=8)
        identities.append([d.identity for unit in sources.plan(data).units for d in sources.documents(unit, data)])
    assert identities[0] == identities[1]
    assert len(set(identities[0])) == len(ROWS)


def test_sample_is_spread_over_the_whole_source(tmp_path, small_units) -> None:
    rows = [f"{number:04d} " + "x" * 95 for number in range(1000)]
    data = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", rows)), seq_len=8)
    taken = list(sources.sample(sources.plan(data).units, data, 10_000))
    assert 5_000 < sum(map(len, taken)) <= 12_000
    assert taken[0] < "0100" and taken[-1] > "0900"


def test_sample_leaves_out_what_is_held_out(tmp_path) -> None:
    data = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", ROWS)), seq_len=8, eval_fraction=0.3)
    plan = sources.plan(data)
    held_out = {d.text for unit in plan.units for d in sources.documents(unit, data) if d.draw < 0.3}
    taken = set(sources.sample(plan.units, data, 10**9))
    assert held_out and taken.isdisjoint(held_out) and taken | held_out == set(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 latin-1", r"a\.txt is not text: byte 3 is not UTF-8"),
        ("a.bin", b"\x7fELF\0\0", r"a\.bin is not text: it holds a NUL"),
        ("a.txt", b"", r"source .*a\.txt is empty"),
        ("a.jsonl", b'{"text": "a"}\n\nnot json\n', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"line 2 has no field text \(body\): set data\.text_field"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field text is int, not text"),
        ("a.jsonl", b'["text"]\n', r"line 1 has no field text \(it is not an object\)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: field text is not text: character 0 is an unpaired surrogate"),
        ("a.jsonl", b'{"text": "a\\u0000"}\n', r"line 1: field text is not text: it holds a NUL"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 is not text: byte 10 is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
        ("a.parquet", b"not parquet at all", r"cannot read .*a\.parquet: Parquet"),
    ],
)
def test_bad_content_is_one_line_that_says_where(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_error_in_a_late_unit_gives_the_line_of_the_file(tmp_path, small_units) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b"broken\n")
    with pytest.raises(DataError, match=r"line 201 is not JSON"):
        texts(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.txt", r"source none\.txt does not exist"),
        ("*.none", r"source \*\.none matches no files"),
        ("folder", r"source folder holds no files"),
        ([], r"data\.source is an empty list"),
        ("hf:./none", r"source hf:\./none"),
        ("s4://bucket/x", r"cannot read source s4://bucket/x: .*s4"),
    ],
)
def test_missing_source_is_named(tmp_path, monkeypatch, source: str | list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        texts(source)
    assert "\n" not in str(caught.value)


def test_wrong_columns_are_named(tmp_path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    datasets.Dataset.from_dict({"body": ["a"], "n": [1]}).save_to_disk(tmp_path / "rows")
    for source in (f"{tmp_path}/a.parquet", f"hf:{tmp_path}/rows"):
        with pytest.raises(DataError, match=r"no column text \(body, n\): set data\.text_field"):
            texts(source)
        with pytest.raises(DataError, match=r"column n is .*not text"):
            texts(source, text_field="n")
    with pytest.raises(DataError, match=r"null\.parquet row 1: field text is null"):
        texts(f"{tmp_path}/null.parquet")


def test_file_that_grows_meanwhile_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("A")
    data = DataConfig(source=f"{tmp_path}/a.txt", seq_len=8)
    plan = sources.plan(data)
    (tmp_path / "a.txt").write_text("AB")
    with pytest.raises(DataError, match="has changed since it was listed"):
        list(sources.documents(plan.units[0], data))
