import json
from pathlib import Path

import pytest

from raymodels.config import Config, validate
from raymodels.data.prepare import prepare
from raymodels.errors import DataError

# A small sample, so that it is Ray that meets the bad document, not the training of the tokenizer.
TOKENIZER = {"vocab_size": 300, "train_bytes": 1000}
# Ray Data warns of its own settings while it copies them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


def config(source: Path, prepared: Path) -> Config:
    return validate(
        {
            "run": {"name": "test"},
            "data": {"source": str(source), "seq_len": 16, "prepared": str(prepared), "tokenizer": TOKENIZER},
            "model": {"hidden_size": 8, "layers": 1, "heads": 1},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1e-3},
            "workers": {"count": 1},
        }
    )


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_ray_data_writes_the_same_bytes(ray_cluster, tmp_path, monkeypatch) -> None:
    source = tmp_path / "rows.jsonl"
    # Over 4 MB, so that there are two units.
    source.write_text("".join(json.dumps({"text": f"row {n} " + "word " * 2000}) + "\n" for n in range(500)))
    steps = []
    prepare(config(source, tmp_path / "ray"), progress=lambda *step: steps.append(step))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    prepare(config(source, tmp_path / "local"))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_bad_document_on_ray_is_the_same_error(ray_cluster, tmp_path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "good"}\n' * 1000 + "broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1001 is not JSON"):
        prepare(config(source, tmp_path / "prepared"))
