"""What a checkpoint promises: it resumes exactly, exports exactly, and is refused when anything about it is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raymodels import manifest, storage
from raymodels.checkpoint import layout
from raymodels.checkpoint.export import export
from raymodels.config import Config
from raymodels.errors import CheckpointError, IntegrityError, StorageError
from raymodels.testing import run_ranks, train_here
from raymodels.train.meter import Phases
from tests.conftest import altered

WORKERS = 2


def losses(config: Config, prepared: str, until: int | None = None) -> list[float]:
    return [report["loss"] for report in train_here(config, prepared, until)[1]]


def final_logits(config: Config, prepared: str) -> torch.Tensor:
    """Train to the end; the trainer's own logits on one fixed line of tokens."""
    session, _ = train_here(config, prepared)
    session.engine.eval()
    with torch.no_grad():
        logits: torch.Tensor = session.engine(input_ids=PROBE).logits
    return logits.float()


PROBE = torch.arange(10, 42).unsqueeze(0)


def attempt(config: Config, prepared: str) -> str:
    from raymodels.train import loop

    warned: list[str] = []
    try:
        session = loop.open_session(config, prepared, Phases(), warned.append)
    except (CheckpointError, IntegrityError, StorageError) as error:
        return f"{type(error).__name__}: {error}"
    return " ".join([f"opened after step {session.state.step}", *warned])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_exactly(tiny: dict[str, Any], prepared: str, tmp_path: Path, stage: int) -> None:
    settings = {"zero": {"stage": stage}, "train": {"steps": 6}, "model": {"dropout": 0.1}}
    whole = altered(tiny, tmp_path / "whole", **settings)
    undisturbed = run_ranks(losses, WORKERS, whole, prepared, 6)[0]
    broken = altered(tiny, tmp_path / "broken", **settings)
    before = run_ranks(losses, WORKERS, broken, prepared, 5)[0]  # committed after step 4, died after step 5
    after = run_ranks(losses, WORKERS, broken, prepared, 6)[0]
    assert before == undisturbed[:5]
    assert after == undisturbed[4:]


@pytest.mark.parametrize(
    ("stage", "arch"),
    [(0, "llama"), (1, "llama"), (2, "llama"), (3, "llama"), (2, "gpt2"), (3, "gpt2"), (2, "qwen3"), (2, "qwen2")],
)
def test_exports_what_was_trained(tiny: dict[str, Any], prepared: str, tmp_path: Path, stage: int, arch: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    heads = {"kv_heads": None} if arch == "gpt2" else {}
    config = altered(tiny, tmp_path, zero={"stage": stage}, model={"arch": arch, **heads})
    logits = run_ranks(final_logits, WORKERS, config, prepared)[0]
    folder = export(layout.open_checkpoint(config.place), tmp_path / "exported", shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(folder)(input_ids=PROBE).logits
    assert torch.allclose(served, logits, atol=1e-5)
    text = "naïve café 模型"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_starting_from_a_directory_gives_its_weights_at_every_stage(
    tiny: dict[str, Any], tiny_model_dir: Path, prepared: str, tmp_path: Path
) -> None:
    curves = []
    for stage in (0, 3):
        raw = {**tiny, "model": {"from": str(tiny_model_dir)}}
        config = altered(raw, tmp_path / str(stage), zero={"stage": stage}, train={"lr": 1e-3})
        curves.append(run_ranks(losses, WORKERS, config, prepared, 4)[0])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.fixture(scope="module")
def run(tiny: dict[str, Any], prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of six steps with checkpoints after 2, 4 and 6, of which two are kept."""
    config = altered(tiny, tmp_path_factory.mktemp("kept"), train={"steps": 6})
    run_ranks(losses, WORKERS, config, prepared, 6)
    return config


def test_retention_keeps_the_newest(run: Config) -> None:
    assert [checkpoint.step for checkpoint in layout.committed(run.place)] == [4, 6]
    assert storage.list_names(f"{run.place}/checkpoints") == ["step-00000004", "step-00000006"]
    state = layout.open_checkpoint(run.place).state()
    assert (state.step, state.world_size, state.zero_stage) == (6, WORKERS, 2)
    assert set(state.metrics) >= {"loss", "eval_loss", "tokens_per_second", "grad_norm"}


def test_a_save_without_a_manifest_does_not_exist(run: Config) -> None:
    torn = layout.step_place(run.place, 8)
    storage.write_bytes(f"{torn}/zero/part.pt", b"half")
    newest = layout.latest(run.place)
    assert newest and newest.step == 6
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        layout.open_checkpoint(torn)
    assert layout.sweep(run.place) == [torn]
    assert not storage.exists(torn)


def test_one_changed_byte_is_found_and_the_checkpoint_before_it_is_used(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, train={"steps": 6})
    run_ranks(losses, WORKERS, config, prepared, 6)
    place = layout.open_checkpoint(config.place).place
    for file in manifest.read(place):
        path = storage.local_path(storage.join(place, file))
        original = path.read_bytes()
        path.write_bytes(original[:-9] + bytes([original[-9] ^ 1]) + original[-8:])
        with pytest.raises(IntegrityError, match=file):
            export(layout.open_checkpoint(config.place), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        path.write_bytes(original)
    path.write_bytes(original[:-9] + bytes([original[-9] ^ 1]) + original[-8:])
    for answer in run_ranks(attempt, WORKERS, config, prepared):
        assert answer.startswith(f"opened after step 4 checkpoint {place} is damaged")
        assert file in answer
    assert [checkpoint.step for checkpoint in layout.committed(config.place)] == [4]
    assert storage.exists(f"{place}/{layout.DAMAGED}")


def test_a_run_with_nothing_but_damage_does_not_start_afresh(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, checkpoint={"every": 4})
    run_ranks(losses, WORKERS, config, prepared)
    place = layout.open_checkpoint(config.place).place
    storage.write_bytes(f"{place}/{layout.STATE}", b"{}")
    [answer, _] = run_ranks(attempt, WORKERS, config, prepared)
    assert answer.startswith("IntegrityError: none of the 1 checkpoints")


def test_another_model_is_refused_with_the_difference(run: Config, prepared: str) -> None:
    other = run.model_copy(update={"model": run.model.model_copy(update={"layers": 1})})
    for answer in run_ranks(attempt, WORKERS, other, prepared):
        assert answer.startswith("CheckpointError")
        assert "parameters there" in answer
        assert "model.layers.1." in answer


def test_export_refuses_a_folder_that_is_not_empty(run: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        export(layout.open_checkpoint(run.place), tmp_path)


def blind(config: Config, prepared: str) -> str:
    """What a start says of which rank 1 sees the newest checkpoint's manifest late, or never."""
    from raymodels.checkpoint import restore

    committed, looks = manifest.is_committed, list[str]()
    restore.VISIBLE_S, restore.PAUSE_S = (30.0, 0.1) if config.checkpoint.keep == 2 else (0.2, 0.1)

    def late(place: str) -> bool:
        looks.append(place)
        hidden = config.checkpoint.keep != 2 or len(looks) < 3
        return not (os.environ["RANK"] == "1" and hidden) and committed(place)

    manifest.is_committed = late
    return attempt(config, prepared)


@pytest.mark.parametrize("keep", [2, 3])
def test_a_rank_that_does_not_see_a_checkpoint_yet_proves_no_damage(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, keep: int
) -> None:
    config = altered(tiny, tmp_path, checkpoint={"every": 2, "keep": keep})
    run_ranks(losses, WORKERS, config, prepared)
    expected = "opened after step 4" if keep == 2 else "StorageError: "
    for answer in run_ranks(blind, WORKERS, config, prepared):
        assert answer.startswith(expected) and "damaged" not in answer
    assert [checkpoint.step for checkpoint in layout.committed(config.place)] == [2, 4]
