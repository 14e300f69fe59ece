"""Commit checkpoints behind the training's back: copy the state to host memory, then write while training goes on.

Every rank writes one file with its fragments and acknowledges size and checksum; rank 0 writes the manifest last. The
acknowledgements travel over a gloo process group of their own, so that they never meet the training's collectives. At
most one save is under way: the next one waits for it, which is what holds training back when storage is too slow.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raymodels import manifest, storage
from raymodels.checkpoint import fragments as live
from raymodels.checkpoint import layout, rest, shards, tensors
from raymodels.config import Config
from raymodels.errors import StorageError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
TICK_S = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a save ended: committed, or why not. ``seconds`` from the snapshot on, ``bytes`` over all ranks."""

    step: int
    place: str
    seconds: float
    bytes: int = 0
    error: str | None = None


class Saver:
    """Saves one engine's state into its run's directory. Every rank has one and calls it alike.

    Args:
        assets: the model's config and tokenizer files, name -> content; rank 0's are used.
    """

    def __init__(self, engine: Any, config: Config, assets: dict[str, bytes]) -> None:
        self._engine, self._run, self._assets, self._settings = engine, config.place, assets, config.checkpoint
        # A rank that tries again keeps the others waiting in the exchange; of one that is gone they hear at once.
        timeout = timedelta(seconds=config.workers.collective_timeout_s + config.checkpoint.retry_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._writer = secrets.token_hex(4)
        self._host: dict[str, torch.Tensor] = {}
        self._fed: dict[int, str] = {}
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []
        self._broken: BaseException | None = None

    def fed(self, step: int, samples: str) -> None:
        """Note the digest of the sample ids that a step, counted from 0, was fed; the next commit records it."""
        self._fed[step] = samples

    def save(self, state: layout.State, going_on: Callable[[], None] = lambda: None) -> None:
        """`wait` for the save before, take a snapshot and begin to write it. Collective."""
        self.wait(going_on)
        start = time.monotonic()
        held = self._snapshot()
        left = rest.copy_rest(self._engine)
        state = replace(
            state, adam_step=live.adam_step(self._engine), loss_scale=live.loss_scale(self._engine), digest=""
        )
        self._thread = threading.Thread(target=self._run_save, args=(state, held, left, start), daemon=True)
        self._thread.start()

    def wait(self, going_on: Callable[[], None] = lambda: None) -> None:
        """Return when no save is under way.

        Args:
            going_on: is called every second meanwhile: however slow storage is, this rank does not hang. Whether
                another does, the exchange finds out.
        """
        while self._thread and self._thread.is_alive():
            self._thread.join(TICK_S)
            going_on()
        self._thread = None
        if self._broken:
            raise self._broken

    def outcomes(self) -> list[Outcome]:
        """Of the saves that ended since the last call, oldest first; the same on every rank, though not at once."""
        ended = self._outcomes.copy()  # one may be added meanwhile
        del self._outcomes[: len(ended)]
        return ended

    def _snapshot(self) -> list[live.Fragment]:
        """This rank's fragments, copied into host memory that is kept from save to save."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        held = []
        for fragment in live.fragments(self._engine):
            if self._engine.zero_optimization_stage() == 0:
                fragment = live.own_share(fragment, rank, world_size)
            copies = {kind: self._host_copy(f"{kind}/{fragment.name}", t) for kind, t in fragment.tensors.items()}
            held.append(replace(fragment, tensors=copies))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return held

    def _host_copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key not in self._host:
            self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._host[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def _run_save(
        self, state: layout.State, held: list[live.Fragment], left: dict[str, torch.Tensor], start: float
    ) -> None:
        try:
            size, error = self._commit(state, held, left)
        except BaseException as broken:  # another rank died in the exchange, or a bug: the next wait raises it
            self._broken = broken
            return
        place = layout.step_place(self._run, state.step)
        self._outcomes.append(Outcome(state.step, place, time.monotonic() - start, size, error))

    def _commit(
        self, state: layout.State, held: list[live.Fragment], left: dict[str, torch.Tensor]
    ) -> tuple[int, str | None]:
        """Write, exchange acknowledgements, write the manifest; the bytes in all and what went wrong, if anything."""
        place = layout.step_place(self._run, state.step)
        written = self._exchange(self._attempt(lambda: self._write(place, held, left)))
        if failures := [answer for answer in written if isinstance(answer, str)]:
            if dist.get_rank() == 0:
                self._attempt(lambda: storage.delete(place))  # what the others wrote may be what filled the disk
            return 0, "; ".join(failures)
        entries = {name: entry for files, _ in written for name, entry in files.items()}
        state = replace(state, digest=live.as_text(sum(share for _, share in written)))
        fed = {step: samples for step, samples in self._fed.copy().items() if step < state.step}
        answer = self._attempt(lambda: self._declare(place, state, entries, fed)) if dist.get_rank() == 0 else None
        [declared, *_] = self._exchange(answer)
        if declared is None:
            for step in fed:
                del self._fed[step]
        if dist.get_rank() == 0 and declared is None:
            # The next save tries again what is left.
            self._attempt(lambda: layout.retain(self._run, self._settings.keep))
        return sum(entry["size"] for entry in entries.values()), declared

    def _write(
        self, place: str, held: list[live.Fragment], left: dict[str, torch.Tensor]
    ) -> tuple[manifest.Entries, int]:
        """This rank's files and its part of the digest."""
        name = shards.file_name(dist.get_rank(), dist.get_world_size(), self._writer)
        flat = {f"{kind}/{fragment.name}": t for fragment in held for kind, t in fragment.tensors.items()}
        entries = {name: tensors.write(storage.join(place, name), flat, shards.metadata(held))}
        if dist.get_rank() == 0:
            for file, content in self._assets.items():
                entries |= _put(place, f"{layout.MODEL}/{file}", content)
            if left:
                entries |= _put(place, rest.file_name(self._writer), rest.to_bytes(left))
        return entries, sum(map(live.digest, held))

    def _declare(self, place: str, state: layout.State, entries: manifest.Entries, fed: dict[int, str]) -> None:
        entries = entries | _put(place, layout.STATE, layout.to_json(state))
        if fed:
            layout.record_samples(self._run, min(fed), [fed[step] for step in sorted(fed)])
        _see(place, entries)
        manifest.commit(place, entries)

    def _attempt(self, action: Callable[[], T]) -> T | str:
        """The action's result, repeated while storage refuses it; in the end why it did not work."""
        deadline, pause = time.monotonic() + self._settings.retry_s, FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (OSError, StorageError) as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    return f"rank {dist.get_rank()}: {error}"
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _exchange(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _see(place: str, entries: manifest.Entries) -> None:
    """See from this host what all ranks say they wrote: a checkpoint of which each host has a part is none.

    Raises:
        StorageError: a file is not there; it may have been deleted by another driver, or lie on a disk of its host.
    """
    if lost := storage.unseen(place, {name: entry["size"] for name, entry in entries.items()}):
        raise StorageError(
            f"{lost} was written, but is not to be seen from {socket.gethostname()}: "
            "run.storage must be one place that all nodes share"
        )


def _put(place: str, name: str, data: bytes) -> manifest.Entries:
    storage.write_bytes(storage.join(place, name), data)
    return {name: manifest.entry(data)}
