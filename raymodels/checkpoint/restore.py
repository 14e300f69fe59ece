"""Load a committed checkpoint into an engine of any ZeRO stage on any number of ranks, and prove that it arrived."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch.distributed as dist

from raymodels import manifest
from raymodels.checkpoint import fragments as live
from raymodels.checkpoint import layout
from raymodels.checkpoint.rest import load_rest
from raymodels.checkpoint.shards import Headers, Shards, read_headers
from raymodels.errors import CheckpointError, IntegrityError, RaymodelsError, StorageError

VISIBLE_S, PAUSE_S = 90.0, 1.0  # NFS clients show a folder as it was up to 60 s before
T = TypeVar("T")


def restore_newest(engine: Any, run: str, warn: Callable[[str], None], known: int = 0) -> layout.State | None:
    """Load a run's newest whole checkpoint; a damaged one is taken out of those that count, with a warning. Collective.

    Args:
        known: the step of a checkpoint that others see, or 0.

    Returns:
        What the loaded one says of itself; None if the run has none at all.

    Raises:
        IntegrityError: there are some, and none is whole. Starting afresh is for the user to decide.
        CheckpointError: the newest whole one is of another model, or did not load.
        StorageError: one cannot be read, which proves no damage; or the known one is not to be seen.
    """
    # On NFS the ranks may not see the same at once.
    candidates = _of_rank_0(visible(run, known) if dist.get_rank() == 0 else [])
    damaged: list[tuple[layout.Checkpoint, str]] = []
    for checkpoint in reversed(candidates):
        try:
            state = restore(engine, checkpoint)
        except IntegrityError as error:
            warn(f"checkpoint {checkpoint.place} is damaged and left out: {error}")
            damaged.append((checkpoint, str(error)))
            continue
        if dist.get_rank() == 0:
            for each, reason in damaged:
                layout.disown(each, reason)
        return state
    if candidates:
        raise IntegrityError(
            f"none of the {len(candidates)} checkpoints in {run} is whole: recover one from a backup, or train under "
            "another run.name"
        )
    return None


def visible(run: str, known: int) -> list[layout.Checkpoint]:
    """The checkpoints that count, oldest first, once the known one or a newer one is among them.

    Raises:
        StorageError: it does not appear. To start afresh then would train a second model.
    """
    if known:
        await_sight(lambda: any(c.step >= known for c in layout.committed(run)), layout.step_place(run, known))
    return layout.committed(run)


def await_sight(look: Callable[[], bool], place: str) -> None:
    """Wait until this host sees what others do: NFS may show it late.

    Raises:
        StorageError: it does not appear.
    """
    deadline = time.monotonic() + VISIBLE_S
    while not look():
        if time.monotonic() >= deadline:
            raise StorageError(
                f"{place}, which others see, is not to be seen from {socket.gethostname()}: run.storage must be one "
                "place that all nodes share"
            )
        time.sleep(PAUSE_S)


def restore(engine: Any, checkpoint: layout.Checkpoint) -> layout.State:
    """Load a committed checkpoint into a fresh engine; what was written by other ranks and stages fits. Collective.

    Every rank checks a share of the files, then reads the elements that it holds itself. In the end the state in
    memory, not the files, is compared with the digest that was taken from memory when it was saved.

    Raises:
        IntegrityError: a file is missing or changed.
        CheckpointError: it is of another model, or what is in memory is not what was saved.
    """
    shards = _open_together(checkpoint.place)
    state = checkpoint.state()
    _same_model(engine, shards, checkpoint.place)
    for fragment in live.fragments(engine, write_back=True):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(shards.read(kind, fragment.name, fragment.start, fragment.numel))
    load_rest(engine, checkpoint.place)
    live.set_adam_step(engine, state.adam_step)
    live.set_loss_scale(engine, state.loss_scale)
    live.spread_masters(engine)
    engine.global_steps = state.step
    engine.global_samples = state.step * engine.train_batch_size()
    engine.skipped_steps = state.step - state.adam_step
    _arrived(engine, state, checkpoint.place)
    return state


def whole_digest(engine: Any) -> str:
    """The digest of the whole training state in memory, in hexadecimal. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = 0
    for fragment in live.fragments(engine):
        alike = engine.zero_optimization_stage() == 0
        mine += live.digest(live.own_share(fragment, rank, world_size) if alike else fragment)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return live.as_text(sum(everyone))


def _arrived(engine: Any, state: layout.State, place: str) -> None:
    found = whole_digest(engine)
    if (found, live.adam_step(engine)) != (state.digest, state.adam_step):
        raise CheckpointError(
            f"{place} did not load: in memory are digest {found} and {live.adam_step(engine)} AdamW steps, "
            f"saved were {state.digest} and {state.adam_step}"
        )


def _same_model(engine: Any, shards: Shards, place: str) -> None:
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    expected = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in named.items()}
    if expected == shards.shapes:
        return
    names = sorted(n for n in expected.keys() | shards.shapes.keys() if expected.get(n) != shards.shapes.get(n))
    told = ", ".join(
        f"{name} is {shards.shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
        for name in names[:3]
    )
    total = {side: sum(map(prod, shapes.values())) for side, shapes in (("there", shards.shapes), ("here", expected))}
    raise CheckpointError(
        f"{place} is of another model ({total['there']:,} parameters there, {total['here']:,} here; {told}): "
        "set model as it was, or train under another run.name"
    )


def _open_together(place: str) -> Shards:
    """Each rank checks its share of the files and reads what they hold; all raise if one found damage, or could not.

    So no file is opened by all: of a thousand ranks each would open a thousand.
    """
    share = (dist.get_rank(), dist.get_world_size())
    mine: Headers | RaymodelsError
    try:
        await_sight(lambda: manifest.is_committed(place), place)  # rank 0 sees it; else it would count as damaged
        manifest.verify(place, share)
        mine = read_headers(place, share)
    except (IntegrityError, StorageError, CheckpointError) as error:
        mine = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if found := [answer for answer in everyone if isinstance(answer, RaymodelsError)]:
        raise next((error for error in found if isinstance(error, StorageError)), found[0])
    return Shards(place, {file: header for headers in everyone for file, header in headers.items()})


def _of_rank_0(value: T) -> T:
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]
