"""The direction of every dependency, read from the imports with `ast`, and what the extras bring of other packages."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raymodels"

# Layers from the ground up; a room may use its own layer's rooms only where the list of pairs below says so.
LAYERS = [
    ["errors", "niceness"],
    ["config", "storage", "ledger"],
    ["manifest", "journal"],
    ["data", "models", "tasks"],
    ["checkpoint"],
    ["registry"],
    ["publish", "cluster", "runs"],
    ["train", "serve", "answers", "protocol", "client", "jobs", "submit", "cluster_files", "doctor", "display"],
    ["batch", "k8s"],
    ["cli", "cli_batch", "cli_runs", "cli_k8s", "cli_keys", "cli_serve", "cli_jobs", "testing", "__init__"],
]
SIDEWAYS = {
    ("tasks", "data"),
    ("client", "protocol"),
    ("client", "answers"),
    ("protocol", "answers"),
    ("cli", "cli_batch"),
    ("cli", "cli_runs"),
    ("cli", "cli_k8s"),
    ("cli", "cli_keys"),
    ("cli", "cli_serve"),
    ("cli", "cli_jobs"),
}
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
# What may be imported as a module is loaded, by the rooms that someone without torch or ray uses.
LIGHT = ["config", "errors", "storage", "manifest", "registry", "client", "protocol", "cli", "submit", "doctor", "jobs"]
LIGHT += ["cli_jobs", "cluster_files", "runs", "cli_runs", "cli_k8s", "cli_keys", "cli_serve", "cli_batch", "k8s.check"]
HEAVY = {"torch", "ray", "transformers", "deepspeed", "datasets"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@functools.cache
def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(whole) if node.module == "raymodels" else {node.module}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("raymodels") or module == "raymodels":
            continue
        there = room(module)
        allowed = there == here or HEIGHT[there] < HEIGHT[here] or (here, there) in SIDEWAYS
        assert allowed, f"{path.name} imports {module}: {here} may not depend on {there}"


def test_every_room_has_its_place() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms <= set(HEIGHT), f"new rooms: {rooms - set(HEIGHT)}"


def test_train_and_serve_meet_only_at_the_checkpoint() -> None:
    for ours, theirs in (("train", "serve"), ("serve", "train")):
        for path in (PACKAGE / ours).rglob("*.py"):
            assert not any(module.startswith(f"raymodels.{theirs}") for module in imports(path)), path


def test_deepspeeds_keys_are_written_in_one_file() -> None:
    for path in FILES:
        if path.name != "zero.py":
            assert 'zero_optimization"' not in path.read_text(), path


def test_light_rooms_load_neither_torch_nor_ray() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("raymodels." + name)
    heavy = sorted({HEAVY!r} & sys.modules.keys())
    assert not heavy, f"raymodels.{{name}} loads {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_is_named_for_nothing() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}]


# What each extra is for; what is imported only if another extra is there too.
EXTRAS = {"train": ["train", "data", "checkpoint", "models", "submit"], "serve": ["serve", "batch"], "k8s": ["k8s"]}
BESIDE = {"vllm", "matplotlib", "ray"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_its_rooms_import(extra: str) -> None:
    brought = closure(f"raymodels[{extra}]")
    distributions = importlib.metadata.packages_distributions()
    for path in (path for name in EXTRAS[extra] for path in (PACKAGE / name).rglob("*.py")):
        for name in {module.partition(".")[0] for module in imports(path)} - sys.stdlib_module_names - BESIDE:
            names = {canonicalize_name(each) for each in distributions.get(name, [])}
            assert name == "raymodels" or names & brought, f"{path.name} imports {name}, which {extra} does not bring"


def closure(requirement: str) -> set[str]:
    """The names of all that pip would install with it."""
    seen: set[tuple[str, frozenset[str]]] = set()
    asked = [Requirement(requirement)]
    while asked:
        one = asked.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # for another platform
            needs = [] if key in seen else importlib.metadata.requires(one.name) or []
            wanted = map(Requirement, needs)
            asked += [
                need
                for need in wanted
                if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))
            ]
        seen.add(key)
    return {name for name, _ in seen}
