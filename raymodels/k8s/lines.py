"""From a place in a rendered object to the file and line that it stems from: a patch, or where the object stands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymodels.errors import ConfigError
from raymodels.k8s import files, kustomize
from raymodels.k8s.manifests import Document, Keys, Place

# What tells the elements of a list apart, as in strategic merge patches.
IDENTITY = ("name", "groupName", "mountPath", "alert", "containerPort", "key", "topologyKey")


@dataclass(frozen=True)
class Piece:
    """A part of a file that sets what lies at ``prefix`` of an object; no node: that removes it."""

    file: Path
    line: int
    prefix: Keys
    node: yaml.Node | None
    offset: int = 1
    """What the lines of nodes, counted from 0 in their own text, need to be the file's, counted from 1."""

    def line_of(self, node: yaml.Node) -> int:
        return node.start_mark.line + self.offset


@dataclass(frozen=True)
class Match:
    piece: Piece
    line: int
    depth: int
    """How many keys of the path were found."""
    value: Any = None


def locate(place: Place, folder: Path | None) -> tuple[Path, int]:
    """The file and line (from 1) that a place stems from; of the nearest there is, where it is missing.

    Args:
        folder: of the kustomization that the object was rendered from, if it was.
    """
    document = place.document
    included = list(kustomize.includes(folder)) if folder else []
    pieces = [piece for file in reversed(included) for piece in _patches(file, document)]
    matches = [
        found for piece in [*pieces, *_origin(document)] if (found := _follow(piece, place.path, document.value))
    ]
    if not matches:
        return document.file, 1
    # What is there was set by the last patch that has it; what is not is missed where the object stands.
    whole = [match for match in matches if match.depth == len(place.path)]
    best = whole[0] if whole else max(reversed(matches), key=lambda match: match.depth)
    if place.path and place.path[-1] == "image" and best.value != place.value:
        best = next(_images(included, place.value), best)
    return best.piece.file, best.line


def _origin(document: Document) -> Iterator[Piece]:
    """Where the object itself stands, or its generator does."""
    trees = files.nodes(document.file)
    if document.file.name in kustomize.NAMES:
        yield from _generators(document, trees[0])
        return
    alike = [tree for tree in trees if _identity(tree)[0] == document.kind]
    named = [tree for tree in alike if _identity(tree)[1] == document.name]
    for tree in (named or alike or trees)[document.index if named else 0 :][:1]:
        yield Piece(document.file, tree.start_mark.line + 1, (), tree)


def _identity(tree: yaml.Node) -> tuple[Any, Any]:
    value = _child(tree, "kind"), _child(_child(tree, "metadata"), "name")
    return tuple(node.value if node is not None else None for node in value)  # type: ignore[return-value]


def _generators(document: Document, tree: yaml.Node) -> Iterator[Piece]:
    """The entries of configMapGenerator and secretGenerator that make the object, and the files they read."""
    folder = document.file.parent
    generator = _child(tree, f"{document.kind[0].lower()}{document.kind[1:]}Generator")
    for entry in generator.value if generator is not None else []:
        name = _child(entry, "name")
        if name is None or not document.name.startswith(name.value):
            continue
        yield Piece(document.file, entry.start_mark.line + 1, (), entry)
        listed = _child(entry, "files")
        for told in listed.value if listed is not None else []:
            key, _, path = told.value.rpartition("=")
            file = Path(os.path.normpath(folder / path))
            prefix = ("data", key or file.name)
            try:
                [*read] = files.nodes(file)
            except ConfigError:  # text of another kind
                read = []
            yield Piece(file, 1, prefix, read[0] if read else None)


def _patches(file: Path, document: Document) -> Iterator[Piece]:
    """What a kustomization's patches set in an object, the last first."""
    [tree, *_] = files.nodes(file)
    found: list[Piece] = []
    for key in ("patches", "patchesStrategicMerge", "patchesJson6902"):
        listed = _child(tree, key)
        for entry in listed.value if listed is not None else []:
            found += _patch(entry, file, document)
    yield from reversed(found)


def _patch(entry: yaml.Node, file: Path, document: Document) -> Iterator[Piece]:
    told = files.construct(entry)
    if isinstance(told, str):
        told = {"path": told}
    where, offset, trees = file, 1, []
    if "path" in told:
        where = Path(os.path.normpath(file.parent / told["path"]))
        trees = files.nodes(where)
    elif (inline := _child(entry, "patch")) is not None:
        offset = _text_offset(inline, 1)
        trees = files.compose(inline.value)
    target = told.get("target")
    for tree in trees:
        if target is not None and not _targets(target, document):
            continue
        if isinstance(tree, yaml.SequenceNode):
            for operation in tree.value:
                yield from _operation(operation, where, offset)
        elif target is not None or _identity(tree) == (document.kind, document.name):
            yield Piece(where, tree.start_mark.line + offset, (), tree, offset)


def _targets(target: dict[str, Any], document: Document) -> bool:
    return all(
        key not in target or re.fullmatch(str(target[key]), value) is not None
        for key, value in (("kind", document.kind), ("name", document.name), ("group", document.group))
    )


def _operation(operation: yaml.Node, file: Path, offset: int) -> Iterator[Piece]:
    told = files.construct(operation)
    parts = [part.replace("~1", "/").replace("~0", "~") for part in str(told["path"]).lstrip("/").split("/")]
    prefix = tuple(int(part) if part.isdecimal() else part for part in parts)
    node = _child(operation, "value") if told["op"] != "remove" else None
    yield Piece(file, (node or operation).start_mark.line + offset, prefix, node, offset)


def _images(included: list[Path], image: Any) -> Iterator[Match]:
    """The entry of a kustomization's ``images`` that made an image what it is."""
    for file in reversed(included):
        [tree, *_] = files.nodes(file)
        listed = _child(tree, "images")
        for entry in listed.value if listed is not None else []:
            told = files.construct(entry)
            if re.match(re.escape(told.get("newName") or told["name"]) + "(:|@|$)", str(image)):
                line = entry.start_mark.line + 1
                yield Match(Piece(file, line, (), entry), line, 0)


def _follow(piece: Piece, path: Keys, rendered: Any) -> Match | None:
    """How far a path leads within a piece."""
    value = rendered
    for depth, key in enumerate(piece.prefix):
        if depth >= len(path):  # the piece sets a part of what the path names
            return None
        if key == "-" and isinstance(value, list) and piece.node is not None and isinstance(path[depth], int):
            wanted = files.construct(piece.node)
            if _step(value, path[depth]) != wanted:
                return None
        elif key != path[depth]:
            return None
        value = _step(value, path[depth])
    if piece.node is None:
        return Match(piece, piece.line, len(piece.prefix))
    return _descend(piece, piece.node, path, len(piece.prefix), value)


def _descend(piece: Piece, node: yaml.Node, path: Keys, depth: int, rendered: Any) -> Match:
    """From the node at ``depth`` of the path, which is ``rendered``, as far as the path leads."""
    line = piece.line
    for position in range(depth, len(path)):
        key = path[position]
        if isinstance(node, yaml.ScalarNode):
            return _embedded(piece, node, path, position) or Match(piece, line, position, node.value)
        found = _element(node, key, _step(rendered, key)) if isinstance(key, int) else _entry(node, key)
        if found is None:
            return Match(piece, line, position)
        mark, node = found
        line, rendered = piece.line_of(mark), _step(rendered, key)
    return Match(piece, line, len(path), node.value if isinstance(node, yaml.ScalarNode) else None)


def _embedded(piece: Piece, node: yaml.ScalarNode, path: Keys, position: int) -> Match | None:
    """As `_descend`, in YAML that is the text of a scalar."""
    try:
        [tree, *_] = files.compose(node.value)
    except (ValueError, ConfigError):  # nothing in it, or no YAML
        return None
    if isinstance(tree, yaml.ScalarNode):
        return None
    inner = Piece(piece.file, piece.line_of(node), (), tree, _text_offset(node, piece.offset))
    return _descend(inner, tree, path, position, files.construct(tree))


def _text_offset(node: yaml.Node, offset: int) -> int:
    """`Piece.offset` of what is parsed from a scalar's text."""
    block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    return node.start_mark.line + block + offset


def _step(value: Any, key: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    found = _entry(node, key) if node is not None else None
    return found[1] if found else None


def _entry(node: yaml.Node, key: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and the value of a mapping's entry; ``<<`` is looked into."""
    merged: list[yaml.Node] = []
    for name, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if name.value == str(key):
            return name, value
        if name.value == "<<":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
    return next((found for one in merged if (found := _entry(one, key))), None)


def _element(node: yaml.Node, index: int, rendered: Any) -> tuple[yaml.Node, yaml.Node] | None:
    """A list's element: the one that is called as the rendered one is, else by position."""
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(rendered, dict):
        for key in IDENTITY:
            if key in rendered:
                named = [item for item in items if (child := _child(item, key)) and child.value == str(rendered[key])]
                return (named[0], named[0]) if named else None
    return (items[index], items[index]) if index < len(items) else None
