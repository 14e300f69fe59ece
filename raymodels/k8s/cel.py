"""CEL rules of a schema (``x-kubernetes-validations``), evaluated on a value."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import cel
from cel.stdlib import add_stdlib_to_context

from raymodels.k8s.manifests import Keys


def broken(value: Any, schema: dict[str, Any], path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Path and message of every rule that does not hold; one that cannot be evaluated does not, as in Kubernetes."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and (error := _fails(rule["rule"], value)):
            yield path + _field(rule), f"{rule.get('message') or rule['rule']}{error}"
    if isinstance(value, dict):
        other = schema.get("additionalProperties")
        for name, item in value.items():
            told = schema.get("properties", {}).get(name, other)
            if isinstance(told, dict):
                yield from broken(item, told, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from broken(item, schema.get("items", {}), (*path, index))


def _fails(rule: str, value: Any) -> str:
    """Empty if the rule holds, else how it does not."""
    context = cel.Context(variables={"self": _escaped(value)})
    add_stdlib_to_context(context)
    try:
        return "" if _program(rule).execute(context) is True else f" (rule: {rule})"
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        return f" (rule: {rule}; evaluating it says {error})"


@cache
def _program(rule: str) -> cel.Program:
    return cel.compile(rule)


def _escaped(value: Any) -> Any:
    """Names that are words of the language are written in rules as ``__namespace__``."""
    if isinstance(value, dict):
        return {"__namespace__" if key == "namespace" else key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _field(rule: dict[str, Any]) -> Keys:
    return tuple(str(rule.get("fieldPath", "")).strip(".").split(".")) if rule.get("fieldPath") else ()
