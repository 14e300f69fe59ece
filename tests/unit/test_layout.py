"""Which checkpoints of a run count, whatever storage answers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from raymodels import manifest, storage
from raymodels.checkpoint import layout, restore, save
from raymodels.errors import StorageError


def commit(run: str, step: int) -> str:
    """A committed checkpoint with one file."""
    place = layout.step_place(run, step)
    storage.write_bytes(f"{place}/zero/part", b"1")
    manifest.commit(place, manifest.describe(place))
    return place


def test_a_checkpoint_on_storage_that_is_away_is_neither_swept_nor_passed_over(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    place = Path(commit(run, 2))
    place.rename(tmp_path / "kept")
    place.symlink_to(place)  # every look at it is an error now, as on a disk that is away for a moment
    for call in (layout.sweep, layout.committed, layout.latest):
        with pytest.raises(StorageError, match="step-00000002"):
            call(run)
    place.unlink()
    (tmp_path / "kept").rename(place)
    assert [checkpoint.step for checkpoint in layout.committed(run)] == [2]


def test_a_host_that_does_not_see_what_the_driver_sees_starts_nothing_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "PAUSE_S", 0.01)
    run = str(tmp_path / "run")
    assert restore.visible(run, 0) == []
    commit(run, 2)
    assert [checkpoint.step for checkpoint in restore.visible(run, 2)] == [2]
    late = threading.Timer(0.2, commit, (run, 4))
    late.start()
    assert [checkpoint.step for checkpoint in restore.visible(run, 4)] == [2, 4]
    monkeypatch.setattr(restore, "VISIBLE_S", 0.05)
    for place in (run, str(tmp_path / "not-mounted")):
        with pytest.raises(StorageError, match=r"step-00000006, which others see, .* run\.storage must be one place"):
            restore.visible(place, 6)


def test_what_is_not_to_be_seen_as_it_was_written_is_not_declared(tmp_path: Path) -> None:
    place = str(tmp_path / "step-00000002")
    for rank in range(2):
        storage.write_bytes(f"{place}/zero/shard-{rank}", b"1")
    entries = manifest.describe(place)
    save._see(place, entries)
    storage.write_bytes(f"{place}/zero/shard-1", b"")
    with pytest.raises(StorageError, match=r"shard-1 was written, but .*run\.storage must be one place"):
        save._see(place, entries)
    storage.delete(place)  # by the sweep of another driver
    with pytest.raises(StorageError, match=r"shard-0 was written"):
        save._see(place, entries)


def test_retention_also_takes_what_failed_saves_and_deletions_have_left_but_no_evidence(tmp_path: Path) -> None:
    run = str(tmp_path)
    places = {step: commit(run, step) for step in range(1, 6)}
    storage.delete(f"{places[1]}/{manifest.FILE}")  # a deletion that got no further
    storage.write_bytes(f"{layout.step_place(run, 6)}/zero/part", b"half")  # a save that is under way
    for step in (2, 3):
        layout.disown(layout.Checkpoint(places[step], step), "a bit flipped")
    commit(run, 3)  # came to again, and saved
    layout.retain(run, 2)
    assert [checkpoint.step for checkpoint in layout.committed(run)] == [4, 5]
    left = storage.list_names(f"{run}/checkpoints")
    assert left == ["step-00000002", "step-00000004", "step-00000005", "step-00000006"]


def test_digests_of_samples_are_read_beside_what_a_write_cut_short_has_left(tmp_path: Path) -> None:
    layout.record_samples(str(tmp_path), 3, ["a", "b"])
    storage.write_bytes(f"{tmp_path}/samples/.00000007.json.0123456789abcdef", b"{")
    assert layout.samples(str(tmp_path)) == {3: "a", 4: "b"}
