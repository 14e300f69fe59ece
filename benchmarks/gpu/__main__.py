"""Show in six minutes what of the line holds on one CUDA card; ``--cpu`` tries the script itself with tiny sizes.

Every part runs in a process of its own under its own time limit, in order of worth. What it has measured is on disk,
row by row, before anything else happens: a part that hangs, is killed or fails costs only itself.

Exit status: 0 all met, 1 something is short or failed, 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu import wheels
from benchmarks.gpu.runs import Outcome, Part, run
from benchmarks.gpu.sheet import Row
from benchmarks.report import text

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
OLDEST_TORCH = (2, 11)
PARTS = [
    Part(name, f"benchmarks.gpu.parts.{name}:measure", limit_s)
    for name, limit_s in (
        ("losses", 90),
        ("step", 100),
        ("engine", 110),
        ("saves", 80),
        ("offload", 110),
        ("planner", 80),
    )
]
LEAST_S = 10
"""Less time than this is too little to begin a part."""
CPU_PATIENCE = 3
"""How much longer than on a card a part may take on a CPU, which may be busy with other things."""


def main(parts: list[Part] = PARTS, given: list[str] | None = None) -> int:
    asked = arguments([part.name for part in parts], given)
    chosen = [part for part in parts if not asked.only or part.name in asked.only]
    asked.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="raymodels-gpu-") as folder:
        try:
            check_torch(asked.cpu)
            brought = wheels.install(asked.wheels, Path(folder, "site"))
        except wheels.Missing as missing:
            print(missing, file=sys.stderr)
            return 2
        # Two tiny parts at a time on a CPU, where time is not what they measure.
        outcomes = run_all(chosen, Path(folder), asked, at_once=2 if asked.cpu else 1)
        head = describe(asked.cpu) | {"commit": commit()} | brought
    return show(outcomes, head, asked.results)


def arguments(names: list[str], given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts; default: 6")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER, help="what benchmarks/gpu/gather gathered")
    parser.add_argument(
        "--results",
        type=lambda text: Path(text).absolute(),
        default=RESULTS,
        help="where the results go, as JSON, and logs",
    )
    asked = parser.parse_args(given)
    if unknown := sorted(set(asked.only or ()) - set(names)):
        parser.error(f"--only {','.join(unknown)}: there is no such part; there are {', '.join(names)}")
    if asked.minutes <= 0:
        parser.error(f"--minutes {asked.minutes:g}: give more than 0")
    return asked


def check_torch(cpu: bool) -> None:
    """
    Raises:
        Missing: there is no torch, too old a one, or no card.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise wheels.Missing(f"{error.name} is not installed, and too large to be carried: install it") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise wheels.Missing(
            f"torch {torch.__version__} is too old: {'.'.join(map(str, OLDEST_TORCH))} or newer is needed"
        )
    if not cpu and not torch.cuda.is_available():
        raise wheels.Missing("torch sees no CUDA card here: run it where one is, or with --cpu at tiny sizes")


def run_all(parts: list[Part], folder: Path, asked: argparse.Namespace, at_once: int) -> list[Outcome]:
    """Run parts in order, each with the time that is left; says how each ended as it ends."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))  # DeepSpeed's kernels are compiled once
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + 60 * asked.minutes

    def one(part: Part) -> Outcome:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            outcome = Outcome(
                part.name, "not run", "no time is left: give --minutes more, or --only this part", 0.0, []
            )
        else:
            kind = "cpu" if asked.cpu else "cuda"
            limit_s = part.limit_s * (CPU_PATIENCE if asked.cpu else 1)
            outcome = run(part, folder, asked.results, kind, min(left, limit_s))
        print(f"{part.name}: {outcome.verdict} after {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
        return outcome

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, parts))


def describe(cpu: bool) -> dict[str, str]:
    """The card and versions, asked of another process: this one must not hold the card's memory."""
    code = f"import json; from benchmarks.gpu.machine import description; print(json.dumps(description({not cpu})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {"machine": done.stderr[-200:]}


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(outcomes: list[Outcome], head: dict[str, str], results: Path) -> int:
    """Print the table, and write it; 1 if anything is short or failed, else 0."""
    content = {"date": time.strftime("%Y-%m-%d"), "machine": head, "parts": [asdict(outcome) for outcome in outcomes]}
    (results / "gpu.json").write_text(json.dumps(content, indent=1))
    table = Table("part", "what was measured", "value", "bound", "verdict", box=None)
    for outcome in outcomes:
        for row in outcome.rows:
            bound = f"{row.op} {_text(row.bound)}" if row.bound is not None else ""
            verdict = f"{row.verdict}: {row.note}" if row.verdict and row.note else row.verdict or row.note
            table.add_row(*map(escape, (outcome.part, row.what, _text(row.value), bound, verdict)))
        told = f"{outcome.verdict}{': ' if outcome.why else ''}{outcome.why}"
        table.add_row(*map(escape, (outcome.part, "the part", f"{outcome.seconds:.0f} s", "", told)))
    console = Console(width=200)
    console.print(table)
    console.print(escape(", ".join(f"{name} {value}" for name, value in head.items())))
    rows: list[Row | Outcome] = [*outcomes, *(row for outcome in outcomes for row in outcome.rows)]
    bad = [each for each in rows if each.verdict in ("short", "failed")]
    print("all met" if not bad else f"{len(bad)} short or failed")
    return 1 if bad else 0


def _text(value: Any) -> str:
    return "" if value is None else text(value)


if __name__ == "__main__":
    sys.exit(main())
