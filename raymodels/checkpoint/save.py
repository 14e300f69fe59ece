"""Commit a checkpoint: every rank writes its shards and acknowledges them, then the manifest is written, last.

Each rank has DeepSpeed write into a staging folder of its own, so what lies there afterwards is exactly what this rank
must vouch for. The files are then moved (local disk, NFS: a rename) or uploaded (object stores) to their place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raymodels import manifest, storage
from raymodels.checkpoint import layout
from raymodels.errors import CheckpointError, IntegrityError, StorageError


def save(engine: Any, run: str, state: layout.State, assets: Path, keep: int) -> layout.Checkpoint:
    """Write and commit a checkpoint of a DeepSpeed engine. Collective: every rank calls it.

    Args:
        assets: a local folder with the model's config and tokenizer files; rank 0's is used.
        keep: how many committed checkpoints of the run remain.

    Raises:
        StorageError: some rank could not write; the message says which and why. Nothing is committed then.
    """
    rank, place = dist.get_rank(), layout.step_place(run, state.step)
    with _staging(place, rank) as staging:
        # Which folders there are is for DeepSpeed's rank 0 to make, which knows only its own staging folder.
        (staging / layout.ZERO).mkdir(parents=True)
        with redirect_stdout(StringIO()):
            engine.save_checkpoint(str(staging), tag=layout.ZERO, save_latest=False)
        for script in staging.glob("*.py"):  # DeepSpeed's converters: `raymodels export` does their work
            script.unlink()
        if rank == 0:
            shutil.copytree(assets, staging / layout.MODEL)
            (staging / layout.STATE).write_bytes(layout.to_json(state))
        acknowledged = _acknowledge(staging, place)
    if rank == 0:
        manifest.commit(place, acknowledged)
        layout.retain(run, keep)
    dist.barrier()
    return layout.Checkpoint(place, state.step)


def restore(engine: Any, checkpoint: layout.Checkpoint, local_rank: int) -> layout.State:
    """Load a committed checkpoint into a fresh DeepSpeed engine of the same world size and stage. Collective.

    Raises:
        IntegrityError: a file is missing or changed.
        CheckpointError: it was written by another number of workers or ZeRO stage, or did not load.
    """
    state = checkpoint.state()
    world_size, stage = dist.get_world_size(), engine.zero_optimization_stage()
    if (state.world_size, state.zero_stage) != (world_size, stage):
        raise CheckpointError(
            f"{checkpoint.place} was written by {state.world_size} workers at ZeRO stage {state.zero_stage}, "
            f"this run has {world_size} at stage {stage}: set workers.count and zero.stage to those"
        )
    _verify_together(checkpoint.place)
    folder = _localized(checkpoint.place, local_rank)
    loaded, _ = engine.load_checkpoint(folder, tag=layout.ZERO)
    if loaded is None or engine.global_steps != state.step:
        raise CheckpointError(f"{checkpoint.place} did not load: the engine is at step {engine.global_steps}")
    return state


class _staging:
    """A rank's own folder: beside the target where a rename can move files out of it, else on local disk."""

    def __init__(self, place: str, rank: int) -> None:
        self.local = storage.is_local(place)
        self.folder = storage.local_path(place) / f".rank-{rank}" if self.local else Path(tempfile.mkdtemp())

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)  # of an interrupted save at this very step
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def _acknowledge(staging: Path, place: str) -> manifest.Entries:
    """Move this rank's files to their place and gather what every rank vouches for."""
    mine: manifest.Entries | str
    try:
        mine = manifest.describe(str(staging))
        for name in mine:
            _place_file(staging / name, storage.join(place, name))
    except (OSError, StorageError) as error:
        mine = f"rank {dist.get_rank()}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if failures := [answer for answer in everyone if isinstance(answer, str)]:
        raise StorageError(f"checkpoint {place} was not saved: {'; '.join(failures)}")
    return {name: entry for entries in everyone for name, entry in entries.items()}


def _place_file(source: Path, target: str) -> None:
    if storage.is_local(target):
        path = storage.local_path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.sync_file(source)
        os.replace(source, path)
        storage.sync_folder(path.parent)
    else:
        storage.copy_file(str(source), target)


def _verify_together(place: str) -> None:
    """Each rank checks its share of the files; all raise if one found damage."""
    problem: str | None = None
    try:
        manifest.verify(place, share=(dist.get_rank(), dist.get_world_size()))
    except IntegrityError as error:
        problem = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    if found := [answer for answer in everyone if answer]:
        raise IntegrityError(f"{found[0]}; remove {place} to resume from the checkpoint before it")


def _localized(place: str, local_rank: int) -> str:
    """The checkpoint as a local folder. A remote one is copied by the first rank of each host."""
    if storage.is_local(place):
        return str(storage.local_path(place))
    folder = Path(tempfile.gettempdir()) / "raymodels-restore" / storage.name(place)
    if local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        for name in manifest.read(place):
            storage.copy_file(storage.join(place, name), str(folder / name))
    dist.barrier()
    return str(folder)
