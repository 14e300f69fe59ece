"""From `fit` to the first step, by phase: the demo's model on two Ray workers, several starts on one local Ray."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Bar, quick, report
from raymodels.config import load
from raymodels.train.launch import train


def main() -> int:
    starts = 2 if quick() else 4
    phases = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(starts):
            overrides = [f"run.storage={folder}/{start}", "train.steps=1", "train.warmup_steps=0", "eval.samples=8"]
            overrides += ["publish=null", f"data.prepared={folder}/prepared"]
            phases.append(train(load(Path(__file__).parents[1] / "jobs/configs/demo.yaml", overrides)).phases)
    names = list(phases[0])
    rows = [
        {"start": number, **{n: found[n] for n in names}, "all": sum(found.values())}
        for number, found in enumerate(phases)
    ]
    return report("start_up", rows, [Bar("median_seconds", statistics.median(row["all"] for row in rows), "<=", 25.0)])


if __name__ == "__main__":
    sys.exit(main())
