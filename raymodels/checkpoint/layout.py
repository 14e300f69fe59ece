"""Where a run keeps its checkpoints, which of them count, and what each says of itself.

    <run>/checkpoints/step-00000050/zero/…           one file a rank: its fragments of the training state
    <run>/checkpoints/step-00000050/model/…          config and tokenizer, Hugging Face layout
    <run>/checkpoints/step-00000050/state.json       `State`
    <run>/checkpoints/step-00000050/MANIFEST.json    every file's size and checksum; written last
    <run>/samples/00000050.json                      digests of the sample ids of the steps up to there

A folder without its manifest is the remains of an interrupted save: no reader sees it, the next start sweeps it up.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from raymodels import manifest, storage
from raymodels.errors import CheckpointError

FORMAT = 2
ZERO = "zero"
MODEL = "model"
STATE = "state.json"
DAMAGED = "DAMAGED.json"
SAMPLES = "samples"


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself.

    ``step`` optimizer steps are done, so step ``step`` (counted from 0) comes next. ``tokens`` were trained on.
    ``metrics`` are the newest known, such as ``loss`` and ``eval_loss`` in nats per token. ``adam_step`` counts AdamW's
    updates, ``loss_scale`` is fp16's. ``digest`` is `raymodels.checkpoint.fragments.digest` summed over all fragments,
    in hexadecimal: what an engine that has loaded this must come to, on any number of workers. ``divergence`` is what
    the policy about diverging losses goes by. ``world_size``, ``zero_stage`` and ``precision`` say how it was written;
    none of them binds who reads it.
    """

    step: int
    tokens: int
    world_size: int
    zero_stage: int
    precision: str
    config_digest: str
    data_fingerprint: str
    metrics: dict[str, float]
    adam_step: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    divergence: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Only `committed` and a finished save make one."""

    place: str
    step: int

    def state(self) -> State:
        raw: dict[str, Any] = storage.read_json(storage.join(self.place, STATE))
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{self.place} has format {raw.get('format')}, this raymodels reads {FORMAT}")
        return State(**raw)


def step_place(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def committed(run: str) -> list[Checkpoint]:
    """The checkpoints of a run directory that count, oldest first."""
    found = [Checkpoint(step_place(run, step), step) for step in _steps(run)]
    return [checkpoint for checkpoint in found if manifest.is_committed(checkpoint.place)]


def latest(run: str) -> Checkpoint | None:
    """The newest committed checkpoint of a run directory, if there is one."""
    for step in reversed(_steps(run)):
        if manifest.is_committed(place := step_place(run, step)):
            return Checkpoint(place, step)
    return None


def open_checkpoint(place: str) -> Checkpoint:
    """A committed checkpoint given by its own folder, or the newest one of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if match := re.fullmatch(r"step-(\d{8})", storage.name(place)):
        if manifest.is_committed(place):
            return Checkpoint(place, int(match[1]))
        raise CheckpointError(f"{place} is not a committed checkpoint: it has no {manifest.FILE}")
    if (found := latest(place)) is None:
        raise CheckpointError(f"{place} has no committed checkpoint: train first, or name another run")
    return found


def record_samples(run: str, begin: int, digests: list[str]) -> None:
    """Keep for good the digests (`raymodels.data.order.digest`) of what the steps from ``begin`` on were fed."""
    place = storage.join(run, SAMPLES, f"{begin + len(digests):08d}.json")
    storage.write_json(place, {"begin": begin, "digests": digests})


def samples(run: str) -> dict[int, str]:
    """The digest of the sample ids that each committed step was really fed, by step counted from 0."""
    found: dict[int, str] = {}
    names = storage.list_names(storage.join(run, SAMPLES))  # a write that was cut short leaves others
    for name in filter(re.compile(r"\d{8,}\.json").fullmatch, names):
        part = storage.read_json(storage.join(run, SAMPLES, name))
        found |= {part["begin"] + index: digest for index, digest in enumerate(part["digests"])}
    return found


def retain(run: str, keep: int) -> None:
    """Delete what is older than the newest ``keep`` committed checkpoints, also what failed saves and deletions left.

    The manifest goes first, so none is half there. Damaged ones are kept.
    """
    kept = committed(run)[-keep:]
    for place in [step_place(run, step) for step in _steps(run) if kept and step < kept[0].step]:
        if manifest.is_committed(place) or not storage.exists(storage.join(place, DAMAGED)):
            storage.delete(storage.join(place, manifest.FILE))
            storage.delete(place)


def disown(checkpoint: Checkpoint, reason: str) -> None:
    """Take a checkpoint out of those that count, leaving its files: what was found is written beside them."""
    declared = storage.read_bytes(storage.join(checkpoint.place, manifest.FILE)).decode(errors="replace")
    storage.write_json(storage.join(checkpoint.place, DAMAGED), {"reason": reason, "manifest": declared})
    storage.delete(storage.join(checkpoint.place, manifest.FILE))


def sweep(run: str) -> list[str]:
    """Delete what interrupted saves left, and say which. Only for the one process that owns the run."""
    places = [step_place(run, step) for step in _steps(run)]
    torn = [
        place
        for place in places
        if not manifest.is_committed(place) and not storage.exists(storage.join(place, DAMAGED))
    ]
    for place in torn:
        storage.delete(place)
    return torn


def _steps(run: str) -> list[int]:
    names = storage.list_names(storage.join(run, "checkpoints"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8})", name)))


def to_json(state: State) -> bytes:
    return storage.to_json(asdict(state))
