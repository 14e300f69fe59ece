"""`raymodels k8s check` on our own overlays with one mistake in each: found, at the right path, and in the right file.

Every mistake is an overlay over an overlay: a kustomization with one patch, or one object more, rendered and checked as
a user's would be. The bars: every mistake found by its own rule, at its path; in the patch's file where the patch sets
what is wrong; and nothing found in any overlay as it is.

On KubeRay's own 94 samples (ray-operator/config/samples at feeaf72, each file a set, `--profile local`) it has 49
findings in 29 files, each true of it: accounts, secrets and gateway classes that a reader is to make (15), kinds of
other projects, whose CRDs are not at hand (8), minReplicas and maxReplicas left to their defaults (8), alpha features
(6), GPU pods whose toleration only some clouds add (6), the dashboard or the client's port published on purpose (6).
By its validation code the operator takes all of them, the alpha features where their gates are on.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Bar, report
from raymodels.k8s import kustomize
from raymodels.k8s.check import Checked, beside_checkout, check
from tests.soak.manifest_mistakes import MISTAKES, REMOVED, Mistake, keys_of
from tests.soak.size import small

K8S = Path(__file__).parents[2] / "k8s"


@dataclass(frozen=True)
class Outcome:
    found: bool
    at_its_path: bool
    in_the_patch: bool | None
    """None where the mistake is missed elsewhere than where it was made."""


def rendered(overlay: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An overlay's objects by Kind/name."""
    if overlay not in known:
        objects = [value for value, _ in kustomize.render(K8S / overlay)]
        known[overlay] = {f"{value['kind']}/{value['metadata']['name']}": value for value in objects}
    return known[overlay]


def kustomization(mistake: Mistake, objects: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What makes the mistake: a patch of the object that it is in, or the object itself where there is none."""
    told: dict[str, Any] = {"resources": [os.path.relpath(K8S / mistake.overlay, folder)]}
    for place, value in mistake.changes.items():
        name, _, path = place.partition(" ")
        kind, _, object_name = name.partition("/")
        if not path and value is REMOVED:
            one = objects[name]
            patch = {key: one[key] for key in ("apiVersion", "kind", "metadata")} | {"$patch": "delete"}
            told.setdefault("patches", []).append({"patch": yaml.safe_dump(patch)})
        elif not path:
            (folder / "more.yaml").write_text(yaml.safe_dump(value))
            told["resources"].append("more.yaml")
        else:
            operation = json_patch(objects[name], keys_of(path), value)
            target = {"kind": kind, "name": object_name}
            patch = {"target": target, "patch": yaml.safe_dump([operation]), "options": {"allowNameChange": True}}
            told.setdefault("patches", []).append(patch)
    return told


def json_patch(target: Any, keys: list[Any], value: Any) -> dict[str, Any]:
    """The operation that sets or removes a value; what the way to it lacks is made, YAML within text is rewritten."""
    for depth, key in enumerate(keys):
        below = target.get(key) if isinstance(target, dict) else target[key] if key < len(target) else None
        last = depth == len(keys) - 1
        if isinstance(below, str) and not last:
            text = yaml.safe_load(below)
            operation = json_patch(text, keys[depth + 1 :], value)
            applied(text, keys[depth + 1 :], operation)
            return {"op": "replace", "path": pointer(keys[: depth + 1]), "value": yaml.safe_dump(text, sort_keys=False)}
        if last or below is None:
            if value is REMOVED:
                return {"op": "remove", "path": pointer(keys)}
            for missing in reversed(keys[depth + 1 :]):
                value = [value] if isinstance(missing, int) else {missing: value}
            there = isinstance(target, list) and key < len(target)
            return {"op": "replace" if there else "add", "path": pointer(keys[: depth + 1]), "value": value}
        target = below
    raise AssertionError(keys)


def applied(text: Any, keys: list[Any], operation: dict[str, Any]) -> None:
    """Do in a parsed text what an operation says, whose path is a beginning of ``keys``."""
    depth = operation["path"].count("/")
    for key in keys[: depth - 1]:
        text = text[key]
    if operation["op"] == "remove":
        del text[keys[depth - 1]]
    else:
        text[keys[depth - 1]] = operation["value"]


def pointer(keys: list[Any]) -> str:
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def outcome(mistake: Mistake, checked: Checked, folder: Path) -> Outcome:
    found = [finding for finding in checked.findings if finding.rule == mistake.rule]
    right = [finding for finding in found if finding.path == mistake.path]
    set_here = any(place == mistake.path for place in mistake.changes)
    in_patch = any(Path(finding.file).resolve().is_relative_to(folder) for finding in right) if set_here else None
    return Outcome(bool(found), bool(right), in_patch)


def main() -> int:
    crds = beside_checkout()
    if crds is None:
        print("skipped: KubeRay's CRDs are not at ../shared/kuberay beside the checkout")
        return 0
    overlays = [leaf.relative_to(K8S) for leaf in kustomize.leaves(K8S)]
    unmutated = {str(overlay): len(check(K8S / overlay, crds).findings) for overlay in overlays}
    rows: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    outcomes = []
    for mistake in MISTAKES[:: 4 if small() else 1]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place).resolve()
            told = kustomization(mistake, rendered(mistake.overlay, known), folder)
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(told))
            one = outcome(mistake, check(folder, crds), folder)
        outcomes.append(one)
        shown = {True: "yes", False: "NO", None: "-"}
        rows.append(
            {
                "mistake": mistake.what,
                "rule": mistake.rule,
                "found": shown[one.found],
                "path": shown[one.at_its_path],
                "file": shown[one.in_the_patch],
                "at": mistake.path,
            }
        )
    patched = [one.in_the_patch for one in outcomes if one.in_the_patch is not None]
    n = len(outcomes)
    print(f"unmutated: {unmutated}")
    bars = [
        Bar(f"found_of_{n}", sum(one.found for one in outcomes), "==", n),
        Bar(f"path_right_of_{n}", sum(one.at_its_path for one in outcomes), "==", n),
        Bar(f"file_right_of_{len(patched)}", sum(patched), "==", len(patched)),
        Bar("findings_unmutated", sum(unmutated.values()), "==", 0),
    ]
    return report("manifest_mutations", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
