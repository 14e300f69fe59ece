"""YAML files: as values, as Kubernetes reads them, and as trees that know their lines."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from raymodels.errors import ConfigError

TIMESTAMP = "tag:yaml.org,2002:timestamp"


class Loader(yaml.CSafeLoader):
    """YAML in which a date is text, and ``=`` too."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (TIMESTAMP, "tag:yaml.org,2002:value")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Unreadable(ConfigError):
    """A file is no YAML that Kubernetes would read; ``line`` where that is known, from 1."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def nodes(file: Path) -> list[yaml.Node]:
    """The documents of a file that are not empty, as trees.

    Raises:
        ConfigError: it cannot be read.
        Unreadable: it is no YAML, or a key is given twice.
    """
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    found = compose(text)
    return [node for node in found if node.value != ""]


@lru_cache(256)
def compose(text: str) -> list[yaml.Node]:
    """
    Raises:
        Unreadable: it is no YAML, or a key is given twice.
    """
    try:
        found = [node for node in yaml.compose_all(text, Loader) if node is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Unreadable(f"not YAML: {getattr(error, 'problem', error)}", mark.line + 1 if mark else 1) from error
    for node in found:
        _no_key_twice(node, set())
    return found


def _no_key_twice(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an anchor's
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if key.value in keys:
                raise Unreadable(f"{key.value} is given twice: keep one", key.start_mark.line + 1)
            keys.add(key.value)
            _no_key_twice(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _no_key_twice(item, seen)


def construct(node: yaml.Node) -> Any:
    return yaml.constructor.SafeConstructor().construct_document(node)


def parse(text: str) -> Any:
    """The value of a text with one document.

    Raises:
        Unreadable: it is no YAML, a key is given twice, or there are several documents.
    """
    found = compose(text)
    if len(found) > 1:
        raise Unreadable("has several documents: one is expected", found[1].start_mark.line + 1)
    return construct(found[0]) if found else None
