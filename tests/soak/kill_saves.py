"""What is left when processes die in the midst of a save, and when a byte of what was saved changes.

Ranks of a tiny model save after every step to slow storage. At a random moment of a save one of them, or all at once as
in a power cut, get SIGKILL; the others go on for a moment, as they would until the cluster ends them. Then everything
starts afresh in new processes and must find the checkpoint being saved or the one before, with the whole training state
bit for bit that of an undisturbed run. A plain DeepSpeed script, with ``save_checkpoint`` after every step and
``load_checkpoint`` by its ``latest`` file, is attacked alike.

Afterwards single bits of a checkpoint's files are flipped, in files drawn at random, and it is loaded as a start does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from benchmarks.report import Bar, report
from raymodels import manifest
from raymodels.checkpoint import layout
from raymodels.config import Config, validate
from raymodels.data.prepare import prepare
from raymodels.errors import IntegrityError
from raymodels.testing import PRELOAD, run_ranks
from tests.soak.saving_ranks import PHASES, WORKERS, Board, load_deepspeed, rank_main, undisturbed
from tests.soak.size import small

STEPS = 1000
MODEL = "transformers.models.llama.modeling_llama"  # imported once, for all ranks to be forked with
BYTES_PER_SECOND = (2e6, 4e6)  # of the ranks; drawn for each, so that one waits for the other
START_SECONDS, SAVE_SECONDS = 60.0, 20.0


def config(folder: str) -> Config:
    words = Path(folder) / "words"
    words.mkdir()
    for page in range(20):
        counted = (f"{number} is one more than {number - 1}." for number in range(100 * page, 100 * page + 100))
        (words / f"{page}.txt").write_text("\n".join(counted))
    return validate(
        {
            "run": {"name": "killed", "storage": f"{folder}/runs"},
            "data": {
                "source": str(words),
                "seq_len": 16,
                "tokenizer": {"vocab_size": 300},
                "eval_fraction": 0.2,
                "prepared": f"{folder}/prepared",
            },
            "model": {"arch": "llama", "hidden_size": 32, "layers": 1, "heads": 2},
            "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "lr": 1e-3, "report_every": 1},
            "workers": {"count": WORKERS},
            "checkpoint": {"every": 1, "keep": 2},
            "eval": {"every": STEPS, "samples": 4},
        }
    )


class Group:
    """The ranks of one start."""

    def __init__(self, contender: str, config: Config, prepared: str, draw: random.Random) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = self._temporary.name
        self.boards = [Board(self.folder, rank) for rank in range(WORKERS)]
        context = multiprocessing.get_context("forkserver")
        speeds = [draw.uniform(*BYTES_PER_SECOND) for _ in range(WORKERS)]
        self.processes: list[BaseProcess] = [
            context.Process(target=rank_main, args=(rank, contender, config, prepared, self.folder, speeds[rank]))
            for rank in range(WORKERS)
        ]

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill(range(WORKERS))
        for process in self.processes:
            process.join()
        self._temporary.cleanup()

    def restored(self) -> dict[str, Any] | str:
        """What all ranks found in the same way, or how they failed to."""
        deadline = time.monotonic() + START_SECONDS
        files = [Path(self.folder, f"restored-{rank}") for rank in range(WORKERS)]
        while not all(file.exists() for file in files):
            died = [rank for rank, process in enumerate(self.processes) if process.exitcode is not None]
            if died or time.monotonic() > deadline:
                lines = [Path(self.folder, f"log-{rank}").read_text().strip().split("\n")[-1] for rank in died]
                return "; ".join(lines) or "hangs"
            time.sleep(0.005)
        first, *others = (json.loads(file.read_text()) for file in files)
        assert all(other == first for other in others), (first, others)
        return dict(first)

    def wait_for_save(self, number: int, rank: int) -> None:
        deadline = time.monotonic() + SAVE_SECONDS
        while self.boards[rank].saves < number:
            died = [rank for rank, process in enumerate(self.processes) if process.exitcode is not None]
            assert not died, Path(self.folder, f"log-{died[0]}").read_text()
            assert time.monotonic() < deadline, "no save begins"
            time.sleep(0.0005)

    def kill(self, ranks: Any) -> None:
        for rank in ranks:
            if self.processes[rank].exitcode is None:
                with suppress(ProcessLookupError):  # the fork server reaps a process before it tells of its end
                    os.kill(self.processes[rank].pid or 0, signal.SIGKILL)


@dataclass
class Tally:
    """What the kills of one contender came to. ``fallen``: how many fell within which phase, also between saves."""

    fallen: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    complaints: Counter[str] = field(default_factory=Counter)

    @property
    def inside(self) -> int:
        return sum(count for phase, count in self.fallen.items() if phase != "between")


def judge(restored: dict[str, Any] | str, saving: int, digests: list[str], tally: Tally) -> str:
    """What a start after a kill found, where step ``saving`` was being saved."""
    if isinstance(restored, str):
        tally.complaints[restored[:100]] += 1
        return "unloadable"
    step: int = restored["step"]
    if restored["digest"] != digests[step]:
        return "silently wrong"
    return {saving: "new", saving - 1: "previous"}.get(step, "older")


def attack(contender: str, config: Config, prepared: str, digests: list[str], kills: int, seed: int) -> Tally:
    """Kill until so many kills fell inside a save, and look each time what is left."""
    draw, tally, duration = random.Random(seed), Tally(), 0.3
    shutil.rmtree(config.place, ignore_errors=True)
    saving, phase = 0, "between"
    while True:
        layout.sweep(config.place)  # as a run's driver does at every start
        with Group(contender, config, prepared, draw) as group:
            restored = group.restored()
            if saving and phase != "between":
                tally.found[judge(restored, saving, digests, tally)] += 1
            if tally.inside >= kills:
                return tally
            if isinstance(restored, str) or restored["digest"] != digests[restored["step"]]:
                shutil.rmtree(config.place)  # what somebody would have to clear up by hand
                saving = 0
                continue
            number, victim = draw.randint(1, 2), draw.randint(0, WORKERS)
            watched = victim % WORKERS
            group.wait_for_save(number, watched)
            begun = time.monotonic()
            if tally.inside < 3:  # how long a save takes, for the moments that are drawn
                group.wait_for_save(number + 1, watched)
                duration, number = max(duration, time.monotonic() - begun), number + 1
            time.sleep(draw.uniform(0, duration))
            killed = range(WORKERS) if victim == WORKERS else [victim]
            group.kill(killed)
            for rank in killed:
                group.processes[rank].join()
            phase, saving = group.boards[watched].phase, restored["step"] + group.boards[watched].saves
            tally.fallen[phase] += 1
            tally.victims["all at once" if victim == WORKERS else f"rank {victim}"] += phase != "between"
            time.sleep(draw.uniform(0, 0.3))


def flip(path: Path, draw: random.Random) -> Callable[[], None]:
    """Flip one bit of a file; the function returned undoes it."""
    content = path.read_bytes()
    position = draw.randrange(len(content))
    changed = bytes([content[position] ^ (1 << draw.randrange(8))])
    path.write_bytes(content[:position] + changed + content[position + 1 :])
    return lambda: (path.write_bytes(content), None)[1]


def flips_ours(config: Config, prepared: str, count: int, seed: int) -> Counter[str]:
    """Flip bits of a run's newest checkpoint, and verify it as every start does before it loads."""
    from raymodels.checkpoint.restore import restore, whole_digest
    from raymodels.train import loop
    from raymodels.train.meter import Phases

    session, draw = loop.open_session(config, prepared, Phases(), lambda text: None), random.Random(seed)
    newest = layout.open_checkpoint(config.place)
    names = sorted([*manifest.read(newest.place), manifest.FILE])
    right, outcomes = whole_digest(session.engine), Counter[str]()
    for _ in range(count):
        undo = flip(Path(newest.place, draw.choice(names)), draw)
        try:
            restore(session.engine, newest)
            outcomes["without effect" if whole_digest(session.engine) == right else "silently wrong"] += 1
        except IntegrityError:
            outcomes["found"] += 1
        undo()
    return outcomes


def flips_deepspeed(config: Config, prepared: str, count: int, seed: int) -> Counter[str]:
    """The same of a DeepSpeed checkpoint; found is what raises in ``load_checkpoint``."""
    from raymodels.checkpoint.restore import whole_digest
    from raymodels.train import loop
    from raymodels.train.meter import Phases

    config = config.model_copy(update={"run": config.run.model_copy(update={"name": "flipped"})})
    session, draw = loop.open_session(config, prepared, Phases(), lambda text: None), random.Random(seed)
    loop.optimizer_step(session, 0, Phases(), loop.Votes())
    place = f"{config.place}/deepspeed"
    session.engine.save_checkpoint(place, tag="step-1", client_state={"done": 1})
    right, outcomes = whole_digest(session.engine), Counter[str]()
    files = sorted(path for path in Path(place).rglob("*") if path.is_file() and path.suffix != ".py")
    for _ in range(count):
        undo = flip(draw.choice(files), draw)
        loop.optimizer_step(session, 0, Phases(), loop.Votes())  # so that what is in memory is not what was saved
        try:
            done = load_deepspeed(session.engine, place)
            whole = done == 1 and whole_digest(session.engine) == right
            outcomes["without effect" if whole else "silently wrong"] += 1
        except Exception:  # unpickling damaged bytes raises anything
            outcomes["found"] += 1
        undo()
    return outcomes


def main() -> int:
    kills, their_kills, flips, their_flips = (20, 6, 40, 20) if small() else (200, 40, 200, 40)
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the server imports DeepSpeed
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, MODEL])
    forkserver.ensure_running()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder)
        prepared = prepare(settings).place
        [digests, _] = run_ranks(undisturbed, WORKERS, settings, prepared, 6 * max(kills, their_kills))
        for contender, count in (("DeepSpeed", their_kills), ("raymodels", kills)):
            tally = attack(contender, settings, prepared, digests, count, seed=11)
            rows.append(_row(contender, tally))
            for complaint, times in tally.complaints.items():
                print(f"{contender}, {times} x: {complaint}")
        [ours] = run_ranks(flips_ours, 1, settings, prepared, flips, 5)
        [theirs] = run_ranks(flips_deepspeed, 1, settings, prepared, their_flips, 5)
    for row, outcomes, count in zip(rows, (theirs, ours), (their_flips, flips), strict=True):
        row |= {"flips": count, **{kind: outcomes[kind] for kind in ("found", "without effect", "silently wrong")}}
    mine = rows[1]
    bars = [
        Bar("kills_inside_a_save", mine["kills"], ">=", kills),
        Bar("unloadable", mine["unloadable"], "==", 0),
        Bar("silently_wrong_or_older", mine["wrong"] + mine["older"], "==", 0),
        Bar("flips_found", mine["found"], "==", flips),
    ]
    return report("kill_saves", rows, bars)


def _row(contender: str, tally: Tally) -> dict[str, Any]:
    return {
        "saved by": contender,
        "kills": sum(tally.found.values()),
        "of": ", ".join(f"{name} {count}" for name, count in sorted(tally.victims.items())),
        "within": ", ".join(f"{phase} {tally.fallen[phase]}" for phase in PHASES[1:] if tally.fallen[phase]),
        "new": tally.found["new"],
        "previous": tally.found["previous"],
        "older": tally.found["older"],
        "unloadable": tally.found["unloadable"],
        "wrong": tally.found["silently wrong"],
    }


if __name__ == "__main__":
    sys.exit(main())
