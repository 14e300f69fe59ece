"""What the dashboards and alerts of k8s/ ask Prometheus, and what is wrong with a question.

A question is checked against `Exported`: every metric with its type and labels. `faults` follows labels through the
expression: a label that no series has makes a matcher, a grouping or a join silently empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

MONITORING = Path(__file__).parents[2] / "k8s/components/monitoring"
MACROS = {"$__rate_interval": "5m", "$__range": "6h"}
LABEL_VALUES = re.compile(r"label_values\((.+), ?(\w+)\)")
OVER_COUNTERS = {"rate", "irate", "increase"}
OVER_GAUGES = {"delta", "deriv", "changes", "last_over_time", "min_over_time", "max_over_time", "quantile_over_time"}


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus stores it: ``type`` is counter, gauge or bucket."""

    type: str
    labels: frozenset[str]


Exported = Mapping[str, Metric]


@dataclass(frozen=True)
class Question:
    """An expression, where it stands, and the labels that the text beside it shows of the answer."""

    where: str
    expression: str
    shown: frozenset[str] = frozenset()


def questions() -> list[Question]:
    return [*dashboard_questions(), *alert_questions()]


def alerts() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(MONITORING.glob("alerts-*.yaml"))
    rules = [(file, yaml.safe_load(file.read_text())["spec"]["groups"]) for file in files]
    return [
        (f"{file.name} {rule['alert']}", rule) for file, groups in rules for group in groups for rule in group["rules"]
    ]


def dashboards() -> dict[str, dict[str, Any]]:
    return {file.name: json.loads(file.read_text()) for file in sorted((MONITORING / "dashboards").glob("*.json"))}


def alert_questions() -> Iterator[Question]:
    for where, rule in alerts():
        shown = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
        yield Question(where, rule["expr"], frozenset(shown))


def dashboard_questions() -> Iterator[Question]:
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                asked = LABEL_VALUES.fullmatch(variable["query"]["query"])
                assert asked, f"{name} ${variable['name']}: {variable['query']['query']}"
                yield Question(f"{name} ${variable['name']}", asked[1], frozenset({asked[2]}))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                shown = re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])
                expression = target["expr"]
                for macro, value in MACROS.items():
                    expression = expression.replace(macro, value)
                yield Question(f"{name} {panel['title']!r}", expression, frozenset(shown))


def selectors(expression: str) -> list[promql.VectorSelector]:
    """Every selection of series in an expression."""
    found: list[promql.VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        for child in children(node):
            visit(child)

    visit(promql.parse(expression))
    return found


def children(node: Any) -> list[Any]:
    if isinstance(node, promql.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql.Call):
        return list(node.args)
    if isinstance(node, promql.MatrixSelector):
        return [node.vector_selector]
    return [node.expr] if hasattr(node, "expr") else []


def faults(question: Question, exported: Exported) -> list[str]:
    """What is wrong with a question, in sentences; nothing if it can be answered."""
    checked = Labels(exported)
    labels = checked.of(promql.parse(question.expression))
    checked.know(question.shown, labels, "the text beside it")
    return [f"{question.where}: {fault}" for fault in checked.faults]


@dataclass
class Labels:
    """The labels of an expression's answer, and the faults that were met on the way to it."""

    exported: Exported
    faults: list[str] = field(default_factory=list)

    def know(self, named: Any, labels: frozenset[str], where: str) -> None:
        for label in sorted(set(named) - labels):
            self.faults.append(f"no series has the label {label} of {where}")

    def of(self, node: Any) -> frozenset[str]:
        if isinstance(node, promql.VectorSelector):
            return self.selected(node)
        if isinstance(node, promql.AggregateExpr):
            return self.aggregated(node)
        if isinstance(node, promql.BinaryExpr):
            return self.joined(node)
        if isinstance(node, promql.Call):
            return self.called(node)
        inner = [self.of(child) for child in children(node)]
        return inner[0] if inner else frozenset()

    def selected(self, node: promql.VectorSelector) -> frozenset[str]:
        metric = self.exported.get(node.name)
        if metric is None:
            self.faults.append(f"nothing exports {node.name}")
            return frozenset()
        self.know([matcher.name for matcher in node.matchers.matchers], metric.labels, node.name)
        return metric.labels

    def aggregated(self, node: promql.AggregateExpr) -> frozenset[str]:
        labels = self.of(node.expr)
        if node.modifier is None:
            return frozenset()
        named = frozenset(node.modifier.labels)
        self.know(named, labels, f"{node.op} by")
        return named if node.modifier.type == promql.AggModifierType.By else labels - named

    def joined(self, node: promql.BinaryExpr) -> frozenset[str]:
        left, right = self.of(node.lhs), self.of(node.rhs)
        scalar = any(isinstance(unwrapped(side), promql.NumberLiteral) for side in (node.lhs, node.rhs))
        if scalar:
            return left | right
        matching = node.modifier.matching if node.modifier else None
        if matching is None:
            if left != right:
                self.faults.append(f"{node.op} joins series by {sorted(left)} with series by {sorted(right)}")
        elif matching.type == promql.LabelModifierType.Include:
            self.know(matching.labels, left & right, f"on ({', '.join(matching.labels)})")
        return left

    def called(self, node: promql.Call) -> frozenset[str]:
        labels = frozenset().union(*(self.of(argument) for argument in node.args))
        name = node.func.name
        for argument in node.args:
            if isinstance(argument, promql.MatrixSelector):
                self.fits(name, argument.vector_selector.name)
        if name == "histogram_quantile":
            self.know(["le"], labels, name)
            return labels - {"le"}
        return frozenset() if name in ("absent", "time") else labels

    def fits(self, function: str, name: str) -> None:
        metric = self.exported.get(name)
        if metric and function in OVER_COUNTERS and metric.type == "gauge":
            self.faults.append(f"{function} of {name}, which is a gauge")
        if metric and function in OVER_GAUGES - {"last_over_time"} and metric.type != "gauge":
            self.faults.append(f"{function} of {name}, which is a counter")


def unwrapped(node: Any) -> Any:
    while isinstance(node, promql.ParenExpr):
        node = node.expr
    return node
