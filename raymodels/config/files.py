"""Configs as YAML files, with dotted overrides."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from raymodels.config.plain import Root, dump, validate
from raymodels.config.training import Config
from raymodels.errors import ConfigError

FLOAT, TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.CSafeLoader):  # in C, as a file of 10,000 API keys takes Python's own parser seconds
    """YAML as people mean it: 1e-3 is a number, a date is text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise not read back as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != TIMESTAMP]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


def load(path: str | Path, overrides: list[str] | None = None, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Read a YAML config and apply ``a.b=value`` overrides, whose values are YAML too.

    Raises:
        ConfigError: the file cannot be read, an override has no ``=``, or a setting is wrong; names each setting.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error
    raw = _mapping(text, str(path))
    for override in overrides or []:
        _apply(raw, override)
    return validate(raw, root)


def from_yaml(text: str, source: str) -> Config:
    """A training config from YAML text; ``source`` is its name in errors."""
    return validate(_mapping(text, source))


def to_yaml(config: BaseModel) -> str:
    return yaml.dump(dump(config), Dumper=_Dumper, sort_keys=False)


def _mapping(text: str, source: str) -> dict[str, Any]:
    raw = _parsed(text, f"cannot read config {source}")
    if not isinstance(raw, dict):
        raise ConfigError(f"config {source} must be a mapping of sections, not {type(raw).__name__}")
    return raw


def _parsed(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    value = _parsed(text, f"--set {override}")
    node: Any = raw
    *parents, last = path.split(".")
    for depth, key in enumerate(parents, start=1):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[_position(node, key, override)]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(parents[:depth])} is not a section")
    node[_position(node, last, override)] = value


def _position(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """The key, as an index where the node is a list."""
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f"--set {override}: a list of {len(node)} has no element {key}: count from 0, as in models.0.cpus=2"
        )
    return int(key)
