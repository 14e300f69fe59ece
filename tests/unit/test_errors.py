"""Every error of ours survives pickling: it may be raised in one process and caught in another."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from raymodels.serve.engine import Delta, Token
from raymodels.serve.replica import Accepted, Embedded
from raymodels.serve.schema import Problem, overloaded
from raymodels.train.failure import Failure

ROOT = Path(__file__).parents[2]
PROBLEM = Problem(status=400, message="said", param="n", code="c", retry_after_s=3)
SAMPLES: dict[str, Any] = {
    "str": "said",
    "str | None": "told",
    "int": 3,
    "int | None": 4,
    "float | None": 1.5,
    "tuple[int, int] | None": (1, 2),
    "Problem": PROBLEM,
    "Failure": Failure(1, "host", "node", 2, 3.0, "step 12", (), "trace", None),
}


def errors() -> list[type[Exception]]:
    """All classes of the package that derive from an exception, by what stands in their files."""
    classes = [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), node)
        for path in sorted((ROOT / "raymodels").rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    names, before = {"Exception", "ValueError", "RuntimeError", "OSError"}, 0
    while len(names) > before:
        before = len(names)
        names |= {node.name for _, node in classes if any(ast.unparse(base) in names for base in node.bases)}
    return [
        getattr(importlib.import_module(module), node.name)
        for module, node in classes
        if node.name in names and node.bases
    ]


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    takes = inspect.signature(kind.__init__).parameters.values()
    named = [each for each in takes if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)][1:]
    error = kind(**{each.name: SAMPLES[each.annotation] for each in named}) if named else kind("said")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), vars(copy), copy.args) == (str(error), vars(error), error.args)
    assert str(copy) in ("said", "told", "trace")


@pytest.mark.parametrize(
    "item",
    [
        PROBLEM,
        overloaded("later"),
        Accepted(3, ("tools",)),
        Embedded([[1.0]], 2),
        [Delta(0, "text", 1, (Token(1, b"\xe2", -0.5, 0, ()),), "stop")],
    ],
    ids=lambda item: type(item).__name__,
)
def test_what_a_replica_answers_survives_pickling(item: Any) -> None:
    assert pickle.loads(pickle.dumps(item)) == item
