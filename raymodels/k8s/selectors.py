"""Which pods a label selector, a PodMonitor or a NetworkPolicy means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raymodels.k8s.manifests import Document, Place
from raymodels.k8s.workloads import GENERATED, Pod


def selects(selector: Place, labels: dict[str, str]) -> bool:
    """Whether a label selector, or a Service's plain mapping, means pods with these labels."""
    told = selector.value or {}
    if not told.keys() <= {"matchLabels", "matchExpressions"}:
        told = {"matchLabels": told}
    wanted = told.get("matchLabels") or {}
    # A generated name cannot be known beforehand, so nothing that names it in full can be meant.
    equal = all(labels.get(key) == value != GENERATED for key, value in wanted.items())
    return equal and all(_holds(expression, labels) for expression in told.get("matchExpressions") or [])


def _holds(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    key, values = expression.get("key"), expression.get("values") or []
    match expression.get("operator"):
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "In":
            return labels.get(str(key)) in values
        case "NotIn":
            return labels.get(str(key)) not in values
    return False


def monitored(monitor: Document, pods: Iterable[Pod]) -> list[Pod]:
    return [pod for pod in pods if selects(monitor.at("spec", "selector"), pod.labels)]
