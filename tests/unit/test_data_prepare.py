import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from raymodels.config import Config, validate
from raymodels.data import parallel, tokenizer, units
from raymodels.data.dataset import Prepared
from raymodels.data.prepare import prepare
from raymodels.errors import DataError

pytestmark = pytest.mark.slow

TEXTS = [f"document {number}: " + " ".join(str(n) for n in range(number % 90)) for number in range(300)]


def config(source: Path | str, prepared: Path, **data: object) -> Config:
    section = {"source": str(source), "seq_len": 16, "prepared": str(prepared), "tokenizer": {"vocab_size": 300}}
    return validate(
        {
            "run": {"name": "test"},
            "data": section | data,
            "model": {"hidden_size": 8, "layers": 1, "heads": 1},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1e-3},
            "workers": {"count": 1},
        }
    )


def documents(prepared: Prepared, split: str) -> list[str]:
    """The texts of a split, decoded from its samples."""
    samples = prepared.split(split, 10**6, False)
    decode = tokenizer.encoder((Path(prepared.tokenizer_dir) / "tokenizer.json").read_text()).decode
    found = [samples.sample(index) for index in range(len(samples))]
    assert all(tokens[-1] == prepared.manifest["eos_id"] for tokens in found)
    return [decode(tokens[:-1].tolist()) for tokens in found]


def contents(place: str) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A source of several units, prepared in this process: `test_number_of_processes...` compares with others."""
    monkeypatch.setattr(units, "SMALLEST_UNIT", 10_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    path = tmp_path / "source" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_every_document_is_prepared_once(source, tmp_path) -> None:
    steps = []
    done = prepare(config(source, tmp_path / "p"), progress=lambda *step: steps.append(step))
    train, held_out = documents(done, "train"), documents(done, "eval")
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 1 <= len(held_out) <= 20
    units_count = steps[-1][1]
    assert units_count > 3 and steps == [(number, units_count) for number in range(units_count + 1)]


def test_manifest_counts_what_is_there(source, tmp_path) -> None:
    done = prepare(config(source, tmp_path / "p"))
    for name, split in done.manifest["splits"].items():
        tokens = np.concatenate([np.append(t[:1], t[1:]) for t in _documents(done, name)])
        assert split["tokens"] == len(tokens) == sum(shard["tokens"] for shard in split["shards"])
        assert split["documents"] == len(_documents(done, name))
        shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
        assert split["unigram_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert done.manifest["dtype"] == "uint16" and done.vocab_size == 300
    assert {file.split("/")[0] for file in contents(done.place)} == {
        "manifest.json",
        "tokenizer",
        *(shard["file"] for split in done.manifest["splits"].values() for shard in split["shards"]),
    }


def _documents(done: Prepared, name: str) -> list[np.ndarray]:
    split = done.split(name, 10**6, False)
    return [split.sample(index) for index in range(len(split))]


def test_number_of_processes_does_not_change_a_byte(source, tmp_path, monkeypatch) -> None:
    alone = prepare(config(source, tmp_path / "alone"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    several = prepare(config(source, tmp_path / "several"))
    assert contents(alone.place) == contents(several.place)


def test_preparing_again_reuses(source, tmp_path) -> None:
    first = prepare(config(source, tmp_path / "p"))
    again = prepare(config(source, tmp_path / "p", seq_len=64, pack=False))
    assert (first.reused, again.reused) == (False, True)
    assert again.place == first.place


def test_touched_source_is_prepared_again_to_the_same_fingerprint(source, tmp_path) -> None:
    first = prepare(config(source, tmp_path / "p"))
    os.utime(source, ns=(1, 1))
    again = prepare(config(source, tmp_path / "p"))
    assert not again.reused and again.place != first.place and again.fingerprint == first.fingerprint


@pytest.mark.parametrize("change", [{"eval_fraction": 0.1}, {"tokenizer": {"vocab_size": 280}}])
def test_settings_that_change_the_content_change_the_fingerprint(source, tmp_path, change) -> None:
    first, other = prepare(config(source, tmp_path / "p")), prepare(config(source, tmp_path / "p", **change))
    assert not other.reused and other.fingerprint != first.fingerprint


def test_interrupted_preparation_is_overwritten(source, tmp_path) -> None:
    whole = prepare(config(source, tmp_path / "p"))
    expected = contents(whole.place)
    (Path(whole.place) / "manifest.json").unlink()
    (Path(whole.place) / "train-00000.bin").write_bytes(b"half")
    assert not prepare(config(source, tmp_path / "p")).reused
    assert contents(whole.place) == expected


def test_two_at_once_end_right(source, tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=prepare, args=(config(source, tmp_path / "p"),)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    found = prepare(config(source, tmp_path / "p"))
    assert found.reused and len(documents(found, "train")) + len(documents(found, "eval")) == len(TEXTS)


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.499])
@pytest.mark.parametrize("count", [2, 3])
def test_few_documents_fill_both_splits(tmp_path, count: int, fraction: float) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(TEXTS[number])
    done = prepare(config(folder, tmp_path / "p", eval_fraction=fraction))
    found = [documents(done, name) for name in ("train", "eval")]
    assert all(found) and sorted(found[0] + found[1]) == TEXTS[:count]
    assert len([file for file in contents(done.place) if file.endswith(".bin")]) == 2


def test_one_document_is_too_few(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(DataError, match=r"holds 1 documents.*split it into several files"):
        prepare(config(tmp_path / "one.txt", tmp_path / "p"))
    assert not contents(str(tmp_path / "p"))


def test_bad_document_leaves_nothing_behind(source, tmp_path, monkeypatch) -> None:
    source.write_text(source.read_text() + "broken\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(DataError, match=r"rows\.jsonl line 301 is not JSON"):
        prepare(config(source, tmp_path / "p"))
    assert not contents(str(tmp_path / "p"))


@pytest.mark.parametrize("fails", [True, False])
def test_who_fails_takes_nothing_from_who_prepares_the_same(source, tmp_path, monkeypatch, fails: bool) -> None:
    """Of two at once the second finishes within the first; then one of them cannot read its source any more."""
    from raymodels.data import prepare as module

    encode, finished = module._encode, list[Prepared]()

    def overtaken(*given):
        monkeypatch.setattr(module, "_encode", encode)
        outcomes = encode(*given)
        if not fails:
            shutil.rmtree(given[0].place)  # by the other, which failed
            return outcomes
        finished.append(prepare(config(source, tmp_path / "p")))
        raise DataError("cannot read the source: Stale file handle")

    monkeypatch.setattr(module, "_encode", overtaken)
    with pytest.raises(DataError, match="cannot read the source" if fails else "is gone since it was written"):
        prepare(config(source, tmp_path / "p"))
    found = prepare(config(source, tmp_path / "p"))
    assert found.reused == fails and found.place == (finished[0].place if fails else found.place)
    assert len(documents(found, "train")) + len(documents(found, "eval")) == len(TEXTS)


def test_bad_document_is_found_with_a_loaded_tokenizer(source, tmp_path, monkeypatch) -> None:
    tokenizer.train(TEXTS, 300).write(str(tmp_path / "tok"))
    source.write_text(source.read_text() + "broken\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(DataError, match=r"rows\.jsonl line 301 is not JSON"):
        prepare(config(source, tmp_path / "p", tokenizer={"from": str(tmp_path / "tok")}))
    assert not contents(str(tmp_path / "p"))


def test_loaded_tokenizer(source, tmp_path) -> None:
    tokenizer.train(TEXTS, 280).write(str(tmp_path / "tok"))
    named = prepare(config(source, tmp_path / "p", tokenizer={"from": str(tmp_path / "tok")}))
    of_model = prepare(config(source, tmp_path / "p", tokenizer=None), tokenizer_from=str(tmp_path / "tok"))
    assert of_model.reused and of_model.place == named.place
    assert named.vocab_size == 280
    assert sorted(documents(named, "train") + documents(named, "eval")) == sorted(TEXTS)


def test_tokenizer_of_the_model_gives_way_to_the_configured_one(source, tmp_path) -> None:
    done = prepare(config(source, tmp_path / "p"), tokenizer_from=str(tmp_path / "none"))
    assert done.vocab_size == 300


def test_first_error_ends_a_run() -> None:
    with pytest.raises(DataError, match="2"):
        list(parallel.run(_fail_at_two, range(4)))


def _fail_at_two(number: int) -> int:
    if number == 2:
        raise DataError("2")
    return number
