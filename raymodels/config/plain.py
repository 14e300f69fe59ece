"""Configs as plain data: check, dump and compare."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raymodels.config.serving import KeysConfig, ServeConfig, TableConfig
from raymodels.config.training import Config
from raymodels.errors import ConfigError

Root = TypeVar("Root", Config, ServeConfig, KeysConfig, TableConfig)
Path = tuple[int | str, ...]


def validate(raw: dict[str, Any], root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Check a config given as plain data.

    Raises:
        ConfigError: a setting is wrong; names each, and for an unknown one the nearest right name.
    """
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(error, root))) from None


def dump(config: BaseModel) -> dict[str, Any]:
    """Plain data that `validate` reads back to an equal config. Unset optional settings are left out."""
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def difference(old: Config, new: Config) -> list[str]:
    """What differs in meaning, one ``section.key: old -> new`` a line."""
    return _changes(old.meaning(), new.meaning())


def changed_settings(old: Config, new: Config) -> list[str]:
    """What differs at all, in the same form."""
    return _changes(dump(old), dump(new))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    sentences = []
    for item in error.errors():
        path, known = _located(root, item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            sentences.append(f"{path}: unknown key; {hint}")
        elif item["type"] == "missing":
            sentences.append(f"{path}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
            sentences.append(f"{path}: {message}{shown}" if path else f"{message}{shown}")
    return sentences


def _located(root: type[BaseModel], loc: Path) -> tuple[str, list[str]]:
    """The dotted path of a setting and the keys there are in its section.

    Behind a setting pydantic's path goes on with the type that did not fit; that part is left out.
    """
    section: type[BaseModel] | None = root
    parts: list[str] = []
    known: list[str] = []
    for key in loc:
        if section is None:
            break
        parts.append(str(key))
        if isinstance(key, str):
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            known = sorted(fields)
            section = _section_of(fields[key].annotation) if key in fields else None
    return ".".join(parts), known


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a type, following optional and list types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _section_of(part))), None)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}
