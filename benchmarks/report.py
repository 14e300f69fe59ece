"""How every benchmark ends: its table, the same as JSON, and one line per bar."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Bar:
    """What a figure must meet: ``value op bound``."""

    name: str
    value: float
    op: str
    bound: float

    @property
    def met(self) -> bool:
        return bool(OPERATORS[self.op](self.value, self.bound))


def quick() -> bool:
    """Whether ``--quick`` was asked for on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same measurement")
    return bool(parser.parse_args().quick)


def report(name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> int:
    """Print the table and the bars, write both as JSON; 1 if any bar is short, else 0."""
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(escape(text(value)) for value in row.values()))
    Console(width=160).print(table)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rows": rows, "bars": [vars(bar) for bar in bars]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2))
    for bar in bars:
        print(f"bar {bar.name} {text(bar.value)} {bar.op} {text(bar.bound)} {'ok' if bar.met else 'short'}")
    return 0 if all(bar.met for bar in bars) else 1


def text(value: Any) -> str:
    """A figure as tables show it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
