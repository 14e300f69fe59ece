"""What all tiers share: a tiny corpus, a tiny model, configs over them, and one local Ray for the whole run."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from raymodels.config import Config, validate
from tests.random_models import random_model

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in models this small threads only wait for each other
os.environ.setdefault("RAY_worker_niceness", "0")  # else the tests that run beside them would starve Ray's workers
os.environ.setdefault("RAYMODELS_NICENESS", "0")
# A shell that runs this in the background has it ignore Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TIERS = ["unit", "e2e", "dist", "jobs", "cluster"]
OPTIONAL = "vLLM is not installed"  # it is in an extra that nothing else needs; whatever other tests need, CI has
WORDS = ["the", "model", "reads", "a", "line", "and", "learns", "what", "follows", "naïve", "café", "模型", "größer"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test that needs no cluster while the shared Ray is up; of those beside each other, the longest file first."""
    items.sort(key=lambda item: TIERS.index(item.path.relative_to(Path(__file__).parent).parts[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return unskipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return unskipped((yield))


def unskipped(report: Any) -> Any:
    """A report; where RAYMODELS_SKIP_NOTHING is set, as in CI, what was skipped for want of something has failed."""
    if "RAYMODELS_SKIP_NOTHING" in os.environ and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr  # file, line, reason
        if OPTIONAL not in reason:
            report.outcome, report.longrepr = "failed", f"{reason}; RAYMODELS_SKIP_NOTHING is set"
    return report


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 text files between 5 and 300 words long."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(3)
    for number in range(60):
        text = " ".join(draw.choices(WORDS, k=draw.randint(5, 300)))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config as plain data: a 2-layer Llama on the corpus. Prepared data are shared by the whole test run."""
    shared = tmp_path_factory.mktemp("shared")
    return {
        "run": {"name": "tiny", "storage": str(shared / "runs")},
        "data": {
            "source": str(corpus),
            "seq_len": 32,
            "eval_fraction": 0.2,
            "tokenizer": {"vocab_size": 300},
            "prepared": str(shared / "prepared"),
        },
        "model": {"arch": "llama", "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2, "lr": 1e-2, "warmup_steps": 2, "report_every": 1},
        "zero": {"stage": 2},
        "workers": {"count": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "eval": {"every": 2, "samples": 8},
        "registry": str(shared / "registry"),
    }


def altered(raw: dict[str, Any], storage: Path | None = None, **sections: dict[str, Any]) -> Config:
    """The config with some keys of some sections replaced, its run in ``storage``."""
    changed = {
        name: {**value, **sections.pop(name, {})} if isinstance(value, dict) else value for name, value in raw.items()
    }
    changed |= sections
    if storage is not None:
        changed["run"] = {**changed["run"], "storage": str(storage)}
    return validate(changed)


@pytest.fixture(scope="session")
def prepared(tiny: dict[str, Any]) -> str:
    """The place of the corpus, prepared."""
    from raymodels.data.prepare import prepare

    return prepare(altered(tiny)).place


@pytest.fixture(scope="session")
def tiny_model_dir(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and the corpus's byte-level BPE, in Hugging Face layout; 256 positions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(prepared) / "tokenizer")
    return random_model(
        tmp_path_factory.mktemp("tiny-model"),
        tokenizer,
        seed=5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Any:
    """The test run's one local Ray, with room for more logical CPUs than the machine has."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()
