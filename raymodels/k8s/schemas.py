"""Schemas of custom resources, taken strictly, and of the built-in kinds.

As the API server does it: nulls are dropped, defaults are filled in, and then types, unknown fields, lists' keys and
CEL rules are checked. Rules that compare with an older object (``oldSelf``) have nothing to compare with here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from raymodels.errors import ConfigError
from raymodels.k8s import builtin
from raymodels.k8s.cel import broken
from raymodels.k8s.manifests import Document, Place

Found = tuple[str, Place, str]
Schema = dict[str, Any]
UNUSED = ("description", "default", "format", "properties")


def problems(document: Document, crds: Path | None, version: str) -> Iterator[Found]:
    """Rule, place and message of everything that an object's schema refuses.

    Args:
        crds: a folder of CustomResourceDefinitions.
        version: of Kubernetes, such as 1.34, for the built-in kinds.
    """
    value = without_nulls(document.value)
    if (validator := builtin.validator(document.kind, str(document.value.get("apiVersion")), version)) is not None:
        yield from _errors(validator, document.root, value)
        return
    found = custom(crds, document.kind, str(document.value.get("apiVersion")))
    if found is None:
        yield "unknown-kind", document.at("kind"), _no_schema(document, crds)
        return
    schema, validator = found
    value = with_defaults(value, schema)
    yield from _errors(validator, document.root, value)
    yield from _keys_given_twice(document.root, value, schema)
    for path, message in broken(value, schema):
        yield "cel", document.at(*path), message


def _no_schema(document: Document, crds: Path | None) -> str:
    if crds is None:
        return f"{document.kind} has no schema: --crds names no folder with its CustomResourceDefinition"
    known = {kind for file in _files(crds) for kind, _ in _read(file)}
    meant = difflib.get_close_matches(document.kind, known | builtin.KINDS, 1, 0.8)
    hint = f"{meant[0]} is meant, or put its CustomResourceDefinition" if meant else "put its CustomResourceDefinition"
    return f"{document.kind} of {document.value.get('apiVersion')} has no schema: {hint} into {crds}"


@cache
def custom(crds: Path | None, kind: str, api_version: str) -> tuple[Schema, Draft202012Validator] | None:
    """The schema of a custom resource, as its CRD says it and as what refuses unknown fields."""
    likely = f"{api_version.partition('/')[0]}_{kind.lower()}"
    # Reading all takes seconds, so the file that is named for the kind comes first.
    found = sorted(_files(crds) if crds else [], key=lambda file: not file.name.startswith(likely))
    for file in found:
        if (schema := _read(file).get((kind, api_version))) is not None:
            return schema, Draft202012Validator(_strict(schema, top=True))
    return None


def _files(crds: Path) -> list[Path]:
    found = sorted(crds.rglob("*.yaml"))
    if not found:
        raise ConfigError(f"--crds {crds} has no YAML file: name a folder of CustomResourceDefinitions")
    return found


@cache
def _read(file: Path) -> dict[tuple[str, str], Schema]:
    found: dict[tuple[str, str], Schema] = {}
    for crd in yaml.load_all(file.read_text("utf-8"), yaml.CSafeLoader):
        if isinstance(crd, dict) and crd.get("kind") == "CustomResourceDefinition":
            spec = crd["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    schema = version["schema"]["openAPIV3Schema"]
                    found[spec["names"]["kind"], f"{spec['group']}/{version['name']}"] = schema
    return found


def _strict(schema: Any, top: bool = False) -> Any:
    """An OpenAPI schema as one of JSON Schema in which fields it does not name are errors, unless it keeps them."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {
            "type": ["integer", "string"],
            **{key: schema[key] for key in ("pattern", "maxLength") if key in schema},
        }
    told = {key: _strict(value) for key, value in schema.items() if key not in UNUSED}
    if schema.get("format") == "int32":
        told = {"minimum": -(2**31), "maximum": 2**31 - 1, **told}
    if isinstance(schema.get("properties"), dict):
        told["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if top:
            told["properties"]["metadata"] = {"type": "object"}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            told["additionalProperties"] = False
    if schema.get("nullable") and "type" in schema:
        told["type"] = [schema["type"], "null"]
    return told


def _errors(validator: Draft202012Validator, root: Place, value: Any) -> Iterator[Found]:
    for error in sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path))):
        yield from _found(error, root.at(*error.absolute_path))


def _found(error: ValidationError, place: Place) -> Iterator[Found]:
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in error.instance.keys() - known.keys():
            meant = difflib.get_close_matches(name, known, 1)
            hint = f"{meant[0]} is meant" if meant else f"remove it; known: {', '.join(sorted(known)[:12]) or 'none'}"
            yield "unknown-field", place.at(name), f"there is no field {name}: {hint}"
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield "missing-field", place.at(name), f"{name} is required: set it"
    elif error.validator == "enum":
        told = ", ".join(map(str, error.validator_value))
        yield "schema", place, f"{error.instance!r} is not one of {told}"
    else:
        yield "schema", place, f"{error.message[:200]}: the schema asks for {error.validator} {error.validator_value}"


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_defaults(value: Any, schema: Schema) -> Any:
    """A value with what its schema fills in where nothing stands."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        filled = {name: told["default"] for name, told in known.items() if "default" in told and name not in value}
        other = schema.get("additionalProperties")
        other = other if isinstance(other, dict) else {}
        return {name: with_defaults(item, known.get(name, other)) for name, item in {**filled, **value}.items()}
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def _keys_given_twice(place: Place, value: Any, schema: Schema) -> Iterator[Found]:
    """Elements of a list that the schema calls a set or a map, and that are one and the same."""
    if isinstance(value, dict):
        for name, told in schema.get("properties", {}).items():
            if name in value:
                yield from _keys_given_twice(place.at(name), value[name], told)
    elif isinstance(value, list):
        seen = []
        for index, item in enumerate(value):
            keys = schema.get("x-kubernetes-list-map-keys")
            key = [item.get(name) for name in keys] if keys and isinstance(item, dict) else item
            if schema.get("x-kubernetes-list-type") in ("map", "set") and key in seen:
                yield "schema", place.at(index), f"{key} is given twice: keep one"
            seen.append(key)
            yield from _keys_given_twice(place.at(index), item, schema.get("items", {}))
