"""A set of manifests as the rules see it: documents, places within them, and what the set says about itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROFILE = "raymodels/profile"
EXTERNAL = "raymodels/external"
FEATURE_GATES = "raymodels/feature-gates"
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")

Keys = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Document:
    """One object, as it would be applied, and the file that it comes from."""

    value: dict[str, Any]
    file: Path
    index: int = 0
    """Which document of the file."""

    @property
    def kind(self) -> str:
        return str(self.value.get("kind"))

    @property
    def name(self) -> str:
        generated = self.at("metadata", "generateName").value
        return str(self.at("metadata", "name").value or (f"{generated}*" if generated else None))

    @property
    def group(self) -> str:
        return str(self.value.get("apiVersion", "")).rpartition("/")[0]

    @property
    def root(self) -> Place:
        return Place(self, (), self.value)

    def at(self, *keys: str | int) -> Place:
        return self.root.at(*keys)


@dataclass(frozen=True, eq=False)
class Place:
    """A value within a document, or the absence of one (None), with the way to it."""

    document: Document
    path: Keys
    value: Any

    def at(self, *keys: str | int) -> Place:
        value = self.value
        for key in keys:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                value = None
        return Place(self.document, self.path + keys, value)

    def each(self, *keys: str | int) -> Iterator[Place]:
        """The elements of the list or mapping at ``keys``; none where it is missing."""
        there = self.at(*keys)
        if isinstance(there.value, dict):
            yield from (there.at(key) for key in there.value)
        elif isinstance(there.value, list):
            yield from (there.at(index) for index in range(len(there.value)))

    def within(self, value: Any) -> Place:
        """The same place with text that was parsed: its keys continue the path."""
        return Place(self.document, self.path, value)

    def __bool__(self) -> bool:
        return self.value is not None


Problem = tuple[Place, str]
Problems = Iterator[Problem]


def words(text: Any) -> set[str]:
    """The entries of an annotation that lists names, separated by commas or blanks."""
    return {word for word in re.split(r"[,\s]+", str(text or "")) if word}


@dataclass(frozen=True, eq=False)
class ManifestSet:
    """What is applied together."""

    name: str
    documents: list[Document]
    profile: str | None = None
    """Overrides the annotation of the set's Namespace."""
    app: Path | None = None
    """The repository that the image carries under /app, where it is there."""
    _annotations: dict[str, set[str]] = field(default_factory=dict)

    def kinds(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document.kind in kinds]

    def has(self, kind: str, name: Any) -> bool:
        found = any(document.kind == kind and document.name == name for document in self.documents)
        return found or f"{kind}/{name}" in self.declared(EXTERNAL)

    def declared(self, annotation: str) -> set[str]:
        """What all objects of the set together list in an annotation."""
        if annotation not in self._annotations:
            texts = (document.at("metadata", "annotations", annotation).value for document in self.documents)
            self._annotations[annotation] = set().union(*(words(text) for text in texts))
        return self._annotations[annotation]

    @property
    def production(self) -> bool:
        """Whether the production checklist applies: unless the profile is ``local``."""
        if self.profile:
            return self.profile != "local"
        told = [document.at("metadata", "annotations", PROFILE).value for document in self.kinds("Namespace")]
        return "local" not in told


def written(path: Keys) -> str:
    """A path as people write it: ``spec.containers[0].image``, ``data["serve.yaml"].http``."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        elif PLAIN_KEY.fullmatch(key):
            text += f".{key}" if text else key
        else:
            text += f'["{key}"]'
    return text
