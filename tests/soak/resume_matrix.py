"""Resume on another number of workers and at another ZeRO stage: the same state, bit for bit, and the same losses.

Each (stage, workers) trains ten steps, commits, and is restored in every other situation. There the whole state is
gathered through DeepSpeed's own functions and compared with what was gathered before the save; then twenty more steps
are compared with those of a run that nothing has disturbed. Beside it: what DeepSpeed makes of the same situation by
itself, its own save of the same engine loaded by its own load. The models have no dropout: its seeds go by the rank.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Bar, report
from raymodels.checkpoint import layout
from raymodels.config import Config, validate
from raymodels.data.prepare import prepare
from raymodels.testing import run_ranks, train_here
from tests.soak.size import small

SAVED, STEPS = 10, 30
UNEQUAL = "DIFFERENT"
MOMENTS = ("exp_avg", "exp_avg_sq")
WORDS = ["the", "model", "reads", "a", "line", "and", "learns", "what", "follows"]

STAGES = [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)]
WORKERS = [(1, 2), (2, 1), (2, 3), (4, 2), (3, 1)]
WITH_STAGE_0 = [(0, stage) for stage in (0, 1, 2, 3)] + [(stage, 0) for stage in (1, 2, 3)]


@dataclass(frozen=True)
class Place:
    """Where a run is computed."""

    stage: int
    workers: int


Pair = tuple[Place, Place]


def pairs(stages: Iterable[tuple[int, int]], workers: Iterable[tuple[int, int]]) -> list[Pair]:
    workers = list(workers)
    return [(Place(s, n), Place(t, m)) for s, t in stages for n, m in workers]


FULL = pairs(STAGES, WORKERS) + pairs(WITH_STAGE_0, [(2, 3), (2, 1)])
SMALL = pairs([(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)], [(2, 3)]) + pairs([(2, 2)], [(2, 1)])


@dataclass
class State:
    """What a training state is to AdamW, whole, and how many updates it has made."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    step: int

    def equals(self, other: State) -> dict[str, bool]:
        return {
            "weights": _same_bits(self.weights, other.weights),
            "moments": _same_bits(self.moments, other.moments),
            "step": self.step == other.step,
        }


def _same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name].view(torch.int32), other[name].view(torch.int32))
        for name in one
    )


def gathered(engine: Any) -> State:
    """The state as DeepSpeed itself gathers it; collective. At stage 0 every rank holds it whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        # DeepSpeed links its states to the parameters after the first group has stepped, and then never again.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    weights, moments = {}, {}
    for name, param in engine.module.named_parameters():
        weights[name] = (param.detach() if stage == 0 else safe_get_full_fp32_param(param)).clone()
        for kind in MOMENTS:
            state = optimizer.state[param][kind] if stage == 0 else safe_get_full_optimizer_state(param, kind)
            moments[f"{kind}/{name}"] = state.clone()
    adam = optimizer if stage == 0 else optimizer.optimizer
    [step] = {int(state["step"]) for state in adam.state.values() if "step" in state}
    return State(weights, moments, step)


def trained(whole: Config, config: Config, prepared: str, raw: str) -> tuple[list[float], State]:
    """The losses of a run that nothing disturbs; the state of one that dies after its save, DeepSpeed's beside it."""
    losses = [metrics["loss"] for metrics in train_here(whole, prepared)[1]]
    session, _ = train_here(config, prepared, until=SAVED)
    session.engine.save_checkpoint(raw, tag="raw")
    return losses, gathered(session.engine)


@dataclass(frozen=True)
class Resumed:
    """A state after its restore, which took ``seconds``, and the losses from there on; then DeepSpeed's, or why not."""

    state: State
    seconds: float
    losses: list[float]
    raw: State | str


def resumed(config: Config, prepared: str, raw: str) -> Resumed:
    from raymodels.train import loop
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.signals import Signals

    phases = Phases()
    session = loop.open_session(config, prepared, phases, warnings.warn)
    assert session.state.step == SAVED, session.state
    state, losses = gathered(session.engine), []
    with Signals(config.place, 1) as signals:
        interval = Interval(config.checkpoint.every, config.workers.most, 0, 0.0, time.monotonic())
        loop.train(session, phases, lambda metrics: losses.append(metrics["loss"]), signals, interval)
    return Resumed(state, phases.start_up()["restore"], losses, raw_restored(config, prepared, raw))


def raw_restored(config: Config, prepared: str, raw: str) -> State | str:
    """What a fresh engine holds after DeepSpeed's own load, or the exception's name."""
    from raymodels.data.dataset import open_prepared
    from raymodels.models.build import architecture
    from raymodels.train.engine import make_engine, make_model

    logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    data = open_prepared(prepared)
    shape = architecture(config.model, vocab_size=data.vocab_size, seq_len=config.data.seq_len, eos_id=data.eos_id)
    engine = make_engine(config, make_model(config, config.model, shape))
    try:
        place, _ = engine.load_checkpoint(raw, tag="raw")
        return gathered(engine) if place else "nothing loaded"
    except Exception as error:
        return type(error).__name__


class Matrix:
    """Trains each place once, undisturbed and up to the save, and restores from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepared = prepare(self.config(Place(0, 1), "prepare")).place
        self.undisturbed: dict[Place, list[float]] = {}
        self.states: dict[Place, State] = {}

    def config(self, place: Place, name: str) -> Config:
        return validate(
            {
                "run": {"name": name, "storage": str(self.folder / "runs")},
                "data": {
                    "source": str(self.folder / "corpus"),
                    "seq_len": 32,
                    "eval_fraction": 0.2,
                    "tokenizer": {"vocab_size": 300},
                    "prepared": str(self.folder / "prepared"),
                },
                "model": {"arch": "llama", "hidden_size": 40, "layers": 2, "heads": 4, "kv_heads": 2},
                "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "lr": 1e-3, "report_every": 1},
                "zero": {"stage": place.stage},
                "workers": {"count": place.workers},
                "checkpoint": {"every": SAVED},
                "eval": {"every": STEPS, "samples": 8},
            }
        )

    def source(self, place: Place) -> Config:
        """The config of a run that has died at its save."""
        config = self.config(place, f"save-{place.stage}-{place.workers}")
        if place not in self.states:
            whole = self.config(place, f"whole-{place.stage}-{place.workers}")
            args = (whole, config, self.prepared, self.raw(place))
            self.undisturbed[place], self.states[place] = run_ranks(trained, place.workers, *args)[0]
        return config

    def raw(self, place: Place) -> str:
        return str(self.folder / f"raw-{place.stage}-{place.workers}")

    def row(self, before: Place, after: Place) -> dict[str, Any]:
        source = self.source(before)
        name = f"resumed-{before.stage}-{before.workers}-{after.stage}-{after.workers}"
        config = self.config(after, name)
        shutil.copytree(layout.step_place(source.place, SAVED), layout.step_place(config.place, SAVED))
        ranks: list[Resumed] = run_ranks(resumed, after.workers, config, self.prepared, self.raw(before))
        ours, expected = ranks[0], self.undisturbed[before][SAVED:]
        assert len(ours.losses) == len(expected) == STEPS - SAVED
        return {
            "stage": f"{before.stage} -> {after.stage}",
            "workers": f"{before.workers} -> {after.workers}",
            **{part: "equal" if same else UNEQUAL for part, same in self.states[before].equals(ours.state).items()},
            "losses apart": max(abs(a - b) / b for a, b in zip(ours.losses, expected, strict=True)),
            "restore s": ours.seconds,
            "DeepSpeed's own load": _told([rank.raw for rank in ranks], self.states[before]),
        }


def _told(raw: list[State | str], expected: State) -> str:
    if isinstance(raw[0], str):
        return " / ".join(sorted({answer for answer in raw if isinstance(answer, str)}))
    different = [part for part, same in expected.equals(raw[0]).items() if not same]
    return f"loaded, other {', '.join(different)}" if different else "loaded, equal"


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(3)
        (Path(folder) / "corpus").mkdir()
        for number in range(60):
            text = " ".join(draw.choices(WORDS, k=draw.randint(5, 300)))
            (Path(folder) / "corpus" / f"{number}.txt").write_text(text)
        matrix = Matrix(Path(folder))
        for before, after in SMALL if small() else FULL:
            rows.append(matrix.row(before, after))
            print(time.strftime("%X"), *rows[-1].values(), file=sys.stderr, flush=True)
    bars = [
        Bar("states_not_equal", sum(UNEQUAL in row.values() for row in rows), "==", 0),
        Bar("largest_relative_loss_difference", max(row["losses apart"] for row in rows), "<=", 1e-6),
    ]
    return report("resume_matrix", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
