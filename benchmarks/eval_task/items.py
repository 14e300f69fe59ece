"""The items of the task ``first_line``: a docstring's body, and four first lines of which one is its own.

Read from the source of Python's standard library, so they are the same wherever the same Python is.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from pathlib import Path
from typing import Any

import datasets

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    ".",
)
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
LINE = range(20, 90)
"""Characters of a first line."""
BODY = 120
"""Most characters of a body: with a small vocabulary too, an item then fits into 256 tokens."""
WRONG = 3


def dataset(items: int, **_: Any) -> dict[str, datasets.Dataset]:
    """So many items, drawn evenly from all there are, as lm-eval wants them: a split called test."""
    found = documented()
    assert len(found) >= items, f"this Python has {len(found)} docstrings that will do, not {items}"
    chosen = found[:: len(found) // items][:items]
    lines = sorted({each["line"] for each in found})
    return {"test": datasets.Dataset.from_list([_item(each, lines) for each in chosen])}


def documented() -> list[dict[str, str]]:
    """Everything with a docstring of a first line and a body, in order of files and lines; no line comes twice."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for package in PACKAGES for file in sorted((folder / package).glob("*.py"))]
    found = {each["line"]: each for file in files for each in _of(file)}
    return list(found.values())


def _of(file: Path) -> list[dict[str, str]]:
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        line, _, body = (ast.get_docstring(node) or "").partition("\n\n")
        if len(line) in LINE and "\n" not in line and len(body) > 40 and body.isascii() and line.isascii():
            body = inspect.cleandoc(body)[:BODY].rsplit(" ", 1)[0]
            found.append({"kind": KINDS[type(node)], "name": node.name, "line": line, "body": body})
    return found


def _item(each: dict[str, str], lines: list[str]) -> dict[str, Any]:
    draw = random.Random(each["line"])
    wrong = draw.sample([line for line in lines if line != each["line"]], WRONG)
    choices = draw.sample([each["line"], *wrong], 1 + WRONG)
    return each | {"choices": choices, "answer": choices.index(each["line"])}
