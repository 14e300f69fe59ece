"""Which samples are really fed in which step: the same on any number of workers, through deaths and resumes.

Runs of 300 steps (``--size small``: 60) over a small corpus, so that two epochs end within them: undisturbed on one
worker, on 1 to 4 with a death and a resume in the middle, and with three deaths and another number of workers after
each. They die some steps after a save, so steps are done again. Compared are the digests in the runs' reports, step by
step, and the ids with which the loop has really read samples: in each epoch every sample once. Ids do not depend on the
model, so it is the tiniest. (Dropout draws from seeds that go by the rank: with it samples are still the same, but
losses are equal at an unchanged number of workers only.)
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.report import Bar, report
from raymodels.config import Config, validate
from raymodels.data.dataset import Split, open_prepared
from raymodels.data.order import sample_ids
from raymodels.data.prepare import prepare
from raymodels.data.shards import Int64s
from raymodels.testing import run_ranks
from tests.soak.size import small

BATCH = 11  # which none of 2, 3 and 4 workers divides
EPOCHS_ENDED = 2
WORDS = ["the", "model", "reads", "a", "line", "and", "learns", "what", "follows"]
ENTER_STEP, ENTER_BATCH, ENTER_SAMPLES, ENTRIES = 10_000_000, 256, 10**9, 100


class Reading(Split):
    """A split that writes down which samples are read from it."""

    def __init__(self, split: Split) -> None:
        super().__init__([], split.seq_len, split.pad_id)
        self.split = split
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, index: int) -> Int64s:
        self.ids.append(index)
        return self.split.sample(index)


class Died(Exception):
    pass


@dataclass
class History:
    """Of each step that counts, its digest in the reports, and the ids that were read in it over all ranks, sorted."""

    digests: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


def part(config: Config, prepared: str, until: int) -> tuple[int, list[str], list[list[int]]]:
    """Train from where the run is until it dies after a step: where that was; digests and this rank's ids by step."""
    from raymodels.train import loop
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.signals import Signals

    phases = Phases()
    session = loop.open_session(config, prepared, phases, warnings.warn)
    reading = Reading(session.samples)
    session = replace(session, samples=reading)
    digests: list[str] = []
    ids: list[list[int]] = []

    def after_step(metrics: dict[str, Any]) -> None:
        digests.extend(metrics["samples"])
        ids.append(reading.ids)
        reading.ids = []
        if metrics["step"] == until:
            raise Died

    interval = Interval(config.checkpoint.every, int(os.environ["WORLD_SIZE"]), 0, 0.0, time.monotonic())
    with suppress(Died), Signals(config.place, 1) as signals:
        loop.train(session, phases, after_step, signals, interval)
    session.saver.wait()
    return session.state.step, digests, ids


def run(config: Config, prepared: str, parts: list[tuple[int, int]]) -> History:
    """A run in parts, each on so many workers until it dies after so many steps."""
    history = History()
    for workers, until in parts:
        ranks = run_ranks(part, workers, config, prepared, until)
        [begin] = {rank[0] for rank in ranks}
        [digests] = {tuple(rank[1]) for rank in ranks}
        ids = [sorted(chain(*step)) for step in zip(*(rank[2] for rank in ranks), strict=True)]
        assert begin <= len(history.ids) and (begin > 0 or not history.ids), "it did not go on from a save"
        # What was done after the save is done again, and what the dead workers knew is lost.
        history = History(history.digests[:begin] + list(digests), history.ids[:begin] + ids)
    return history


def lost_and_repeated(ids: list[list[int]], samples: int) -> tuple[int, int]:
    """Of the ids as they were fed: how often a sample was missing from an epoch, and how often it came once too often.

    Needs no knowledge of the order: after the step within which epoch k ends, every sample must have come k times, and
    before it none more often.
    """
    seen: Counter[int] = Counter()
    fed = lost = repeated = 0
    for step in ids:
        before = fed // samples
        seen.update(step)
        fed += len(step)
        if fed // samples > before:
            lost += sum(max(0, fed // samples - seen[index]) for index in range(samples))
        repeated += sum(max(0, seen[index] - -(-fed // samples)) for index in set(step))
    return lost, repeated


def entering_ms() -> float:
    """Milliseconds to learn the ids of a step far into the order of a billion samples; the best of several."""
    best = float("inf")
    for entry in range(ENTRIES):
        start = time.perf_counter()
        sample_ids(17, ENTER_STEP + entry, ENTER_BATCH, ENTER_SAMPLES)
        best = min(best, time.perf_counter() - start)
    return best * 1000


def config(folder: Path, name: str, steps: int, pack: bool) -> Config:
    return validate(
        {
            "run": {"name": name, "storage": str(folder / "runs")},
            "data": {
                "source": str(folder / "corpus"),
                "seq_len": 16,
                "pack": pack,
                "eval_fraction": 0.05,
                "tokenizer": {"vocab_size": 300},
                "prepared": str(folder / "prepared"),
            },
            "model": {"arch": "llama", "hidden_size": 8, "layers": 1, "heads": 2},
            "train": {"steps": steps, "global_batch": BATCH, "micro_batch": 3, "lr": 1e-3, "report_every": 1},
            "zero": {"stage": 2},
            "workers": {"count": [1, 4]},
            "checkpoint": {"every": steps // 12},
            "eval": {"every": steps, "samples": 4},
        }
    )


def write_corpus(folder: Path, steps: int) -> None:
    """So many short texts that two and a half epochs or so are seen in so many steps."""
    folder.mkdir()
    draw = random.Random(3)
    for number in range(steps * BATCH // 5 - 2):
        (folder / f"{number:05d}.txt").write_text(" ".join(draw.choices(WORDS, k=draw.randint(5, 60))))


def plans(steps: int, only: list[int]) -> dict[str, list[tuple[int, int]]]:
    """Name -> on how many workers until which step; the first is not disturbed."""
    half, late = steps // 2, steps // 24  # what is redone: half of the steps between saves
    resumed = {f"{n}, resumed": [(n, half + late), (n, steps)] for n in only}
    changing = [(2, steps // 4 + late), (3, half + late), (1, 3 * steps // 4 + late), (4, steps)]
    return {"1, undisturbed": [(1, steps)]} | resumed | {"2 -> 3 -> 1 -> 4": changing}


def main() -> int:
    steps, only = (60, [3]) if small() else (300, [1, 2, 3, 4])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", steps)
        for pack in (True, False):
            data = "packed" if pack else "unpacked"
            prepared = prepare(config(folder, "prepare", steps, pack)).place
            samples = len(open_prepared(prepared).split("train", 16, pack))
            assert EPOCHS_ENDED <= steps * BATCH / samples < EPOCHS_ENDED + 1, samples
            assert samples % BATCH and 2 * samples % BATCH, "an epoch should end within a step"
            undisturbed = History()
            for number, (workers, plan) in enumerate(plans(steps, only).items()):
                found = run(config(folder, f"{data}-{number}", steps, pack), prepared, plan)
                undisturbed = found if len(plan) == 1 else undisturbed
                lost, repeated = lost_and_repeated(found.ids, samples)
                rows.append(
                    {
                        "data": data,
                        "samples": samples,
                        "workers": workers,
                        "steps": len(found.digests),
                        "other digests": _differing(found.digests, undisturbed.digests),
                        "other ids": _differing(found.ids, undisturbed.ids),
                        "lost": lost,
                        "repeated": repeated,
                    }
                )
                print(time.strftime("%X"), *rows[-1].values(), file=sys.stderr, flush=True)
    bars = [
        Bar("least_steps_recorded", min(row["steps"] for row in rows), "==", steps),
        Bar("steps_with_other_digests", sum(row["other digests"] for row in rows), "==", 0),
        Bar("steps_with_other_ids", sum(row["other ids"] for row in rows), "==", 0),
        Bar("samples_lost", sum(row["lost"] for row in rows), "==", 0),
        Bar("samples_repeated", sum(row["repeated"] for row in rows), "==", 0),
        Bar("entering_at_step_10_million_of_a_billion_samples_ms", entering_ms(), "<", 10),
    ]
    return report("sample_exact", rows, bars)


def _differing(found: list[Any], expected: list[Any]) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main())
