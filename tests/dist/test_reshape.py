"""A checkpoint fits any number of workers and any ZeRO stage; the whole matrix is a benchmark.

The models have no dropout: its seeds go by the rank, so losses would be equal at an unchanged number of workers only.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.soak.resume_matrix import Place, State, gathered
from raymodels.checkpoint import layout
from raymodels.checkpoint.shards import Shards
from raymodels.config import Config
from raymodels.errors import CheckpointError
from raymodels.testing import run_ranks, train_here
from raymodels.train.meter import Phases
from tests.conftest import altered

SAVED, STEPS = 2, 6
# Workers that divide the global batch of 8 and some that do not, more and fewer than before.
CASES = [
    (Place(1, 1), Place(1, 2)),
    (Place(2, 2), Place(2, 3)),
    (Place(3, 3), Place(3, 1)),
    (Place(1, 4), Place(3, 2)),
    (Place(3, 2), Place(2, 1)),
    (Place(0, 2), Place(2, 3)),
]


def follow(config: Config, prepared: str, until: int | None = None) -> tuple[list[float], list[str], State]:
    """Losses and digests of samples by step, and the state in the end."""
    session, reports = train_here(config, prepared, until)
    samples = [digest for metrics in reports for digest in metrics["samples"]]
    return [metrics["loss"] for metrics in reports], samples, gathered(session.engine)


def resume(config: Config, prepared: str) -> tuple[State, list[float], list[str]]:
    """The state after the restore, then losses and digests from there on."""
    from raymodels.train import loop

    session = loop.open_session(config, prepared, Phases(), warnings.warn)
    assert session.state.step == SAVED
    state = gathered(session.engine)
    losses, samples, _ = follow(config, prepared)
    return state, losses, samples


def resume_wrongly(config: Config, prepared: str) -> str:
    """Resume with a reader that gives one element of one moment as another."""
    from raymodels.train import loop

    read = Shards.read

    def misread(self: Shards, kind: str, name: str, start: int, numel: int) -> Any:
        found = read(self, kind, name, start, numel)
        if (kind, name) == ("exp_avg_sq", "model.norm.weight") and start <= 5 < start + numel:
            found[5 - start] *= 1 + 1e-6
        return found

    Shards.read = misread  # type: ignore[method-assign]
    try:
        loop.open_session(config, prepared, Phases(), warnings.warn)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.fixture(scope="module")
def place(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A config in a place, for the run of some name."""
    storage = tmp_path_factory.mktemp("reshape")

    def config(where: Place, name: str, pack: bool) -> Config:
        return altered(
            tiny,
            storage,
            run={"name": name},
            data={"pack": pack},
            train={"steps": STEPS},
            zero={"stage": where.stage},
            workers={"count": where.workers},
            checkpoint={"every": SAVED, "keep": 9},
            eval={"every": STEPS},
        )

    return config


@pytest.fixture(scope="module")
def undisturbed(place: Any, prepared: str) -> dict[bool, tuple[list[float], list[str], State]]:
    return {
        pack: run_ranks(follow, 1, place(Place(0, 1), f"whole-{pack}".lower(), pack), prepared)[0]
        for pack in (True, False)
    }


@pytest.mark.parametrize(
    ("number", "before", "after"),
    [(number, *case) for number, case in enumerate(CASES)],
    ids=[f"stage {a.stage} on {a.workers} to stage {b.stage} on {b.workers}" for a, b in CASES],
)
def test_resumes_elsewhere(
    place: Any, prepared: str, undisturbed: Any, number: int, before: Place, after: Place
) -> None:
    pack, name = number % 2 == 0, f"run-{number}"
    first, sampled, saved = run_ranks(follow, before.workers, place(before, name, pack), prepared, SAVED)[0]
    ranks = run_ranks(resume, after.workers, place(after, name, pack), prepared)
    losses, samples, _ = undisturbed[pack]
    for state, further, sampled_further in ranks:
        assert saved.equals(state) == {"weights": True, "moments": True, "step": True}
        assert saved.step == SAVED
        assert first + further == pytest.approx(losses, rel=1e-5)
        assert sampled + sampled_further == samples


def test_samples_are_the_same_however_often_the_workers_change(place: Any, prepared: str, undisturbed: Any) -> None:
    samples: list[str] = []
    for workers, until in ((2, 2), (3, 4), (1, None)):
        config = place(Place(2, workers), "changing", pack=True)
        ranks = run_ranks(follow, workers, config, prepared, until)
        assert all(rank[1] == ranks[0][1] for rank in ranks)
        samples += ranks[0][1]
    assert samples == undisturbed[True][1]
    assert len(set(samples)) == STEPS


def test_what_did_not_arrive_as_it_was_saved_is_refused(place: Any, prepared: str) -> None:
    config = place(Place(2, 2), "misread", pack=True)
    run_ranks(follow, 2, config, prepared, SAVED)
    for answer in run_ranks(resume_wrongly, 3, place(Place(3, 3), "misread", pack=True), prepared):
        assert answer.startswith(f"{layout.step_place(config.place, SAVED)} did not load: in memory are digest ")
