"""What a part has measured, row by row, on disk as soon as it is known: a part that dies keeps the rows before."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import Bar

Value = float | int | str


@dataclass(frozen=True)
class Row:
    """One figure. ``verdict`` is ok, short, failed or not run, and empty without a bound; ``note`` says why."""

    what: str
    value: Value | None = None
    op: str = ""
    bound: float | None = None
    verdict: str = ""
    note: str = ""


class Sheet:
    """The rows of one part, written to ``path`` as JSON at each change."""

    def __init__(self, path: Path) -> None:
        self._path, self.rows = path, list[Row]()
        self._write()

    def figure(self, what: str, value: Value, note: str = "") -> None:
        """A figure without a bound."""
        self._add(Row(what, value, note=note))

    def bar(self, what: str, value: float, op: str, bound: float, note: str = "") -> None:
        """A figure that must meet a bound; NaN meets none."""
        met = Bar(what, value, op, bound).met
        self._add(Row(what, value, op, bound, "ok" if met else "short", note))

    def not_run(self, what: str, why: str) -> None:
        self._add(Row(what, verdict="not run", note=why))

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Around a measurement whose failure must not cost the part's others: it becomes a row."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._add(Row(what, verdict="failed", note=f"{type(error).__name__}: {str(error)[:300]}"))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(row, flush=True)
        self._write()

    def _write(self) -> None:
        begun = self._path.with_suffix(".part")
        begun.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))
        os.replace(begun, self._path)


def read_sheet(path: Path) -> list[Row]:
    """The rows that a part has written; none if it never began."""
    return [Row(**raw) for raw in json.loads(path.read_text())] if path.exists() else []
