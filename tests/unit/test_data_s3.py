import json

import pytest

from raymodels import storage
from raymodels.config import Config, validate
from raymodels.data.dataset import open_prepared
from raymodels.data.prepare import prepare
from raymodels.errors import DataError, IntegrityError

pytestmark = pytest.mark.slow

TEXTS = [f"row {number} " + "word " * (number % 40) for number in range(200)]


def config(source: str, prepared: str) -> Config:
    return validate(
        {
            "run": {"name": "test"},
            "data": {"source": source, "seq_len": 16, "prepared": prepared, "tokenizer": {"vocab_size": 300}},
            "model": {"hidden_size": 8, "layers": 1, "heads": 1},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1e-3},
            "workers": {"count": 1},
        }
    )


def rows() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def test_from_bucket_to_bucket_is_what_it_is_on_disk(bucket, tmp_path) -> None:
    storage.write_bytes(f"{bucket}/rows/a.jsonl", rows())
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(rows())
    remote = prepare(config(f"{bucket}/rows/*.jsonl", f"{bucket}/prepared"))
    on_disk = prepare(config(f"{tmp_path}/rows", f"{tmp_path}/prepared"))
    assert remote.fingerprint == on_disk.fingerprint
    assert prepare(config(f"{bucket}/rows/*.jsonl", f"{bucket}/prepared")).reused
    split, expected = (p.split("train", 16, True) for p in (open_prepared(remote.place), on_disk))
    assert len(split) == len(expected) > 10
    assert all((split.sample(i) == expected.sample(i)).all() for i in range(len(split)))
    assert (tmp_path / "cache").exists() and str(tmp_path / "cache") in remote.tokenizer_dir


def test_changed_shard_does_not_reach_the_cache(bucket, tmp_path) -> None:
    storage.write_bytes(f"{bucket}/rows.jsonl", rows())
    remote = prepare(config(f"{bucket}/rows.jsonl", f"{bucket}/prepared"))
    shard = f"{remote.place}/train-00000.bin"
    content = storage.read_bytes(shard)
    storage.write_bytes(shard, content[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"train-00000\.bin differs from its manifest"):
        remote.split("train", 16, True)
    storage.write_bytes(shard, content)
    assert len(remote.split("train", 16, True))


def test_missing_object_and_bucket_are_named(bucket) -> None:
    with pytest.raises(DataError, match=rf"source {bucket}/none\.txt does not exist"):
        prepare(config(f"{bucket}/none.txt", f"{bucket}/prepared"))
    with pytest.raises(DataError, match=r"s3://other/\*\.txt"):
        prepare(config("s3://other/*.txt", f"{bucket}/prepared"))
