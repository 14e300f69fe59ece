"""lm-eval through the endpoint against lm-eval's own ``hf`` model on the same directory: equal choices, item by item.

A task of four-way questions, built from Python's standard library. Its ``local-completions`` model sends prompts as
token ids and reads log-probabilities of echoed prompts, one request at a time and 16 at once.

The bars: no difference in accuracy, and no item answered differently, for every model and concurrency.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.endpoint import MODEL, serving, tiny_model
from benchmarks.report import Bar, report
from benchmarks.smollm2 import smollm2
from raymodels.errors import RegistryError
from raymodels.registry import Registry
from tests.soak.size import add_size

try:
    import lm_eval
    from lm_eval.tasks import TaskManager
except ImportError:
    sys.exit("lm-eval is not installed: pip install 'raymodels[eval]'")

TASK = "first_line"
DEMO = "python-demo@prod"
ITEMS, SMALL_ITEMS = 320, 60
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval found: an accuracy by metric, and by item the log-likelihoods of its choices."""

    accuracy: dict[str, float]
    likelihoods: list[list[float]]
    correct: list[tuple[float, ...]]
    """By item, whether each metric's choice was right."""
    seconds: float

    @property
    def choices(self) -> list[int]:
        return [max(range(len(item)), key=item.__getitem__) for item in self.likelihoods]


def evaluate(kind: str, items: int, **args: Any) -> Evaluation:
    """Run one of lm-eval's kinds of model, with its arguments, on the task."""
    folder = str(Path(__file__).parents[2] / "benchmarks/eval_task")
    tasks = TaskManager(include_path=folder, include_defaults=False, metadata={"items": items})
    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=kind, model_args=args, tasks=[TASK], task_manager=tasks, bootstrap_iters=0, batch_size=1, device="cpu"
    )
    assert found is not None
    seconds = time.perf_counter() - start
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    assert len(samples) == items
    return Evaluation(
        accuracy={metric: found["results"][TASK][f"{metric},none"] for metric in METRICS},
        likelihoods=[[value for value, _ in sample["filtered_resps"]] for sample in samples],
        correct=[tuple(sample[metric] for metric in METRICS) for sample in samples],
        seconds=seconds,
    )


def compare(name: str, model_dir: Path, items: int, concurrencies: list[int]) -> list[dict[str, Any]]:
    """One row for each concurrency, all against one run of the ``hf`` model."""
    own = evaluate("hf", items, pretrained=str(model_dir), dtype="float32")
    context = AutoConfig.from_pretrained(model_dir).max_position_embeddings
    engine = {"threads": os.cpu_count()}
    rows = []
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), model_dir, {"engine": engine}) as endpoint:
        for concurrency in concurrencies:
            served = evaluate(
                "local-completions",
                items,
                model=MODEL,
                base_url=f"{endpoint.url}/v1/completions",
                tokenizer=str(model_dir),
                tokenizer_backend="huggingface",
                tokenized_requests=True,
                num_concurrent=concurrency,
                max_length=context,
                max_retries=1,
            )
            rows.append({"model": name, "concurrency": concurrency, "items": items, **differences(own, served)})
    return rows


def differences(own: Evaluation, served: Evaluation) -> dict[str, Any]:
    pairs = zip(own.likelihoods, served.likelihoods, strict=True)
    chosen = zip(own.choices, served.choices, own.correct, served.correct, strict=True)
    return {
        "hf": own.accuracy["acc"],
        "endpoint": served.accuracy["acc"],
        "accuracy difference": max(abs(own.accuracy[metric] - served.accuracy[metric]) for metric in METRICS),
        "different choices": sum(a != b or right != wrong for a, b, right, wrong in chosen),
        "worst difference": max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)),
        "closest call": min(sorted(item)[-1] - sorted(item)[-2] for item in own.likelihoods),
        "hf s": own.seconds,
        "endpoint s": served.seconds,
    }


def models(named: list[str], small: bool, folder: Path) -> dict[str, Path]:
    """Those named on the command line; else SmolLM2-135M and the demo's model, or a random one where there is none."""
    if named:
        return {place: Path(place) for place in named}
    if small:
        return {"random": tiny_model(folder / "random")}
    try:
        other = {"demo": Path(Registry("registry").resolve(DEMO).fetch())}
    except RegistryError:
        other = {"random": tiny_model(folder / "random")}
    return {"SmolLM2-135M": smollm2(folder / "smollm2"), **other}


def main() -> int:
    parser = argparse.ArgumentParser()
    add_size(parser, f"{SMALL_ITEMS} items, a tiny model, 16 requests at once")
    parser.add_argument("--model", action="append", default=[], help="a model's directory; may be given again")
    asked = parser.parse_args()
    items, concurrencies = (SMALL_ITEMS, [16]) if asked.size == "small" else (ITEMS, [1, 16])
    with tempfile.TemporaryDirectory() as folder:
        found = models(asked.model, asked.size == "small", Path(folder))
        rows = [row for name, place in found.items() for row in compare(name, place, items, concurrencies)]
    bars = []
    for row in rows:
        at = f"{Path(row['model']).name}_at_{row['concurrency']}"
        bars.append(Bar(f"accuracy_difference_{at}", row["accuracy difference"], "==", 0))
        bars.append(Bar(f"different_choices_{at}", row["different choices"], "==", 0))
    return report("eval_parity", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
