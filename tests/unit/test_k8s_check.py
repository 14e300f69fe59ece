"""`raymodels k8s check`: every rule fires on the mistake it is for, at its place, and on nothing in a good set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raymodels.cli import app as command_line
from raymodels.errors import ConfigError
from raymodels.k8s import check as checks
from raymodels.k8s import operator, operator_jobs, operator_service, sets
from raymodels.k8s.check import Finding, broken_rules, check
from raymodels.k8s.lines import locate
from raymodels.k8s.manifests import written
from raymodels.k8s.quantities import amount
from tests.unit.k8s_mistakes import (
    CASES,
    CONFIG,
    JOB,
    NEXT,
    SCHEMA_CASES,
    SERVED,
    SHARED,
    TRAIN_COMMAND,
    TRAIN_HEAD,
    TRAIN_POD,
    TRAIN_WORKERS,
    budgeted,
    queued,
)
from tests.unit.k8s_set import CRDS, EXTERNAL, IMAGE, REMOVED, ROOT, as_set, container, edited, good, made, pod

RULES = (
    *checks.SET_RULES,
    *checks.PRODUCTION_RULES,
    *operator.CLUSTER_RULES,
    *operator_jobs.JOB_RULES,
    *operator_service.SERVICE_RULES,
)


def places(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Rule and place of everything that the rules find."""
    return {
        (rule, f"{place.document.kind}/{place.document.name} {written(place.path)}".rstrip())
        for rule, place, _ in broken_rules(as_set(objects))
    }


def test_nothing_is_found_in_a_good_set() -> None:
    assert not places(good())


@pytest.mark.parametrize(("rule", "changes", "path"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_rule_fires_at_its_place(rule: str, changes: dict[str, Any], path: str | None) -> None:
    found = places(edited(changes))
    expected = path or next(iter(changes))
    if rule == "same-object-twice":
        expected = "ServiceAccount/train metadata.name"
    assert expected.replace('["num-cpus"]', ".num-cpus").replace('["object-store-memory"]', ".object-store-memory") in {
        where for name, where in found if name == rule
    }


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__.replace("_", "-") for rule in RULES} == {rule for rule, _, _ in CASES}


def test_a_table_may_lead_to_versions_beside_the_gateway_and_to_applications_of_their_own() -> None:
    routes = {
        "python-demo": {"applications": {"python-demo--v3": 0.9, "next": 0.1}},
        "renamed": {"applications": {"python-demo--v2": 1}},
    }
    deployment = {"name": "gateway", "user_config": {"table": routes, "engines": {"next": {"max_batch": 4}}}}
    arguments = {"config": "/etc/raymodels/serve.yaml", "model": "python-demo"}
    changes = {
        f"{SERVED}.applications[0].deployments": [deployment],
        f"{SERVED}.applications[1]": {**NEXT, "args": arguments},
    }
    assert not places(edited(changes))


def test_the_checklist_is_not_for_local_sets() -> None:
    objects = edited(
        {
            f"{JOB}.backoffLimit": 0,
            f"{CONFIG}.http": REMOVED,
            "Namespace/raymodels metadata.annotations": {
                "raymodels/profile": "local",
                "raymodels/external": EXTERNAL,
                "raymodels/feature-gates": "RayCronJob",
            },
        }
    )
    assert not places(objects)


def test_a_claim_of_a_single_node_may_be_its_own_in_a_local_set() -> None:
    claim = "PersistentVolumeClaim/shared"
    changes = {
        f"{claim} spec.accessModes": ["ReadWriteOnce"],
        f'{claim} metadata.annotations["raymodels/single-node"]': "true",
    }
    assert "claim-shared" in {rule for rule, _ in places(edited(changes))}
    local = {'Namespace/raymodels metadata.annotations["raymodels/profile"]': "local"}
    assert not places(edited({**changes, **local}))


def test_quoted_shell_characters_are_left_alone() -> None:
    changes = {f"{JOB}.entrypoint": f"{TRAIN_COMMAND} {SHARED} --set workers.gpus=1 --set 'run.name=a;b'"}
    assert "entrypoint-shell" not in {rule for rule, _ in places(edited(changes))}


def test_a_config_may_be_mounted() -> None:
    text = (ROOT / "jobs/configs/demo.yaml").read_text()
    mounted = {
        f"{JOB}.entrypoint": f"python /app/jobs/train.py /etc/train/train.yaml {SHARED} --set workers.gpus=1",
        f"{TRAIN_HEAD}.containers[0].volumeMounts[2]": {"name": "train", "mountPath": "/etc/train"},
        f"{TRAIN_HEAD}.volumes[2]": {"name": "train", "configMap": {"name": "train"}},
        "x": made("v1", "ConfigMap", "train", data={"train.yaml": text}),
    }
    assert not places(edited(mounted))
    mounted["x"] = made("v1", "ConfigMap", "train", data={"train.yaml": text + "\nunknown: 1\n"})
    assert places(edited(mounted)) >= {("entrypoint-config", f"{JOB}.entrypoint")}


def test_object_stores_are_shared() -> None:
    uris = " ".join(f"--set {key}=s3://bucket/x" for key in ("run.storage", "data.prepared", "registry"))
    changes = {f"{JOB}.entrypoint": f"{TRAIN_COMMAND} {uris} --set workers.gpus=1"}
    assert {rule for rule, _ in places(edited(changes))} == {"registry-shared"}  # the service's is elsewhere


def test_references_that_are_optional_need_not_exist() -> None:
    source = {"secretKeyRef": {"name": "x", "key": "y", "optional": True}}
    env = {f"{TRAIN_HEAD}.containers[0].env[0]": {"name": "X", "valueFrom": source}}
    assert not places(edited(env))


GPU = {"key": "nvidia.com/gpu", "operator": "Exists"}
STORE = f'{TRAIN_WORKERS}.rayStartParams["object-store-memory"]'
POLICY = "NetworkPolicy/within spec.ingress[0]"
ALLOWED = {
    "another toleration first": {f"{TRAIN_POD}.tolerations": [{"operator": "Exists", "effect": "NoExecute"}, GPU]},
    "a toleration of every effect": {f"{TRAIN_POD}.tolerations": [{**GPU, "effect": ""}]},
    "a toleration with a value": {f"{TRAIN_POD}.tolerations": [{"key": GPU["key"], "value": "present"}]},
    "an image with its date": {f"{TRAIN_HEAD}.containers[0].image": (IMAGE % "cpu").replace("@", "-20261130@")},
    "the command line": {
        f"{JOB}.entrypoint": f"raymodels train /app/jobs/configs/demo.yaml {SHARED} --set workers.gpus=1"
    },
    "a default store that fits": {STORE: REMOVED, f"{TRAIN_POD}.volumes[1].emptyDir.sizeLimit": "3Gi"},
    "a budget of the whole gang": budgeted(3),
    "a queue of the job's size": queued(),
    "a queue that borrows": queued(gpus=0, cohortName="all"),
    "a submitter that is no pod": {**queued(), f"{JOB}.submissionMode": "HTTPMode"},
    "a range of other ports": {POLICY: {"ports": [{"port": 8000, "endPort": 8264}]}},
    "pods of all namespaces, by label": {
        POLICY: {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}}]}
    },
    "addresses of a net": {POLICY: {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
}


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_is_not_found(changes: dict[str, Any]) -> None:
    assert not places(edited(changes))


def test_a_store_is_left_to_ray_where_its_memory_is_not_known() -> None:
    changes = {STORE: REMOVED, f"{TRAIN_POD}.containers[0].resources.limits.memory": REMOVED}
    assert "store-fits" not in {rule for rule, _ in places(edited(changes))}
    alone = {STORE: REMOVED, f"{TRAIN_POD}.volumes[1].emptyDir.sizeLimit": REMOVED}
    assert "store-fits" not in {rule for rule, _ in places(edited(alone))}


@pytest.mark.parametrize("command", ["raymodels", "raymodels train", "raymodels doctor /app/jobs/configs/demo.yaml"])
def test_what_is_no_command(command: str) -> None:
    assert "entrypoint-form" in {rule for rule, _ in places(edited({f"{JOB}.entrypoint": command}))}


def test_the_config_of_the_command_line_is_loaded() -> None:
    command = f"raymodels train /app/jobs/configs/demo.yaml {SHARED} --set workers.gpu=1"
    assert ("entrypoint-config", f"{JOB}.entrypoint") in places(edited({f"{JOB}.entrypoint": command}))


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("1.5", 1.5), ("8Gi", 8 * 2**30), ("2k", 2000), ("1e3", 1000), (2, 2)]
)
def test_quantities(text: Any, number: float) -> None:
    assert float(amount(text) or 0) == number


@pytest.mark.parametrize("text", ["8 Gi", "8GB", "", "1.2.3", None, True, "Gi"])
def test_what_is_no_quantity(text: Any) -> None:
    assert amount(text) is None


# With schemas: whole files, as the command line checks them.

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not beside the repository")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def written_to(file: Path, objects: list[dict[str, Any]]) -> Path:
    file.write_text(yaml.safe_dump_all(objects, sort_keys=False))
    return file


@needs_crds
def test_a_good_file_has_no_findings(tmp_path: Path) -> None:
    done = check(written_to(tmp_path / "set.yaml", good()), CRDS)
    assert not done.findings
    assert done.objects == len(good())


@needs_crds
@pytest.mark.parametrize(("rule", "changes", "path"), SCHEMA_CASES, ids=[case[0] for case in SCHEMA_CASES])
def test_schemas(tmp_path: Path, rule: str, changes: dict[str, Any], path: str | None) -> None:
    # Only what is changed, so that reading schemas does not take all the time.
    names = {change.partition(" ")[0] for change in changes}
    objects = [
        one
        for one in edited(changes)
        if f"{one['kind']}/{one['metadata']['name']}" in names or one["kind"][-2:] == "bb"
    ]
    done = check(written_to(tmp_path / "set.yaml", objects), CRDS, profile="local")
    assert (path or next(iter(changes))) in {one.path for one in done.findings if one.rule == rule}


@needs_crds
def test_nulls_are_dropped_and_defaults_filled_in(tmp_path: Path) -> None:
    changes = {f"{JOB}.suspend": None, f"{JOB}.deletionStrategy": None}
    assert not check(written_to(tmp_path / "set.yaml", edited(changes)), CRDS).findings


@needs_crds
def test_lines_of_plain_files(tmp_path: Path) -> None:
    text = yaml.safe_dump_all(edited({f"{JOB}.backoffLimit": -1}), sort_keys=False)
    (tmp_path / "set.yaml").write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "backoffLimit: -1" in line)
    assert {(one.line, one.rule) for one in check(tmp_path, CRDS).findings} >= {(line, "backoff-limit")}


@pytest.mark.parametrize(("text", "line"), [("a: [", 2), ("kind: A\nmetadata: {}\nkind: B\n", 3), ("x\n", 1)])
@needs_crds
def test_what_cannot_be_read_is_a_finding(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "x.yaml").write_text(text)
    [finding] = check(tmp_path, CRDS).findings
    assert (finding.rule, finding.line) == ("cannot-be-read", line)


def overlay(folder: Path) -> Path:
    """A base with a ConfigMap and a Pod, a component, and an overlay that changes them in every way."""
    files = {
        "base/kustomization.yaml": """resources: [pod.yaml]
configMapGenerator:
  - name: made
    files: [told.yaml]
""",
        "base/told.yaml": "a: 1\nb: 2\n",
        "base/pod.yaml": yaml.safe_dump(
            made("v1", "Pod", "p", spec=pod("default", container("c"), container("d"))["spec"]), sort_keys=False
        ),
        "part/kustomization.yaml": "kind: Component\npatches:\n  - path: merge.yaml\n",
        "part/merge.yaml": """kind: Pod
apiVersion: v1
metadata: {name: p, namespace: raymodels}
spec:
  containers:
    - name: d
      args: [x]
""",
        "over/kustomization.yaml": """resources: [../base]
components: [../part]
images:
  - name: raymodels
    newTag: "7"
patches:
  - target: {kind: Pod}
    patch: |
      - op: add
        path: /spec/tolerations
        value:
          - key: k
            effect: Never
      - op: remove
        path: /spec/automountServiceAccountToken
""",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "over"


@needs_kubectl
@pytest.mark.parametrize(
    ("kind", "path", "file", "line"),
    [
        ("Pod", ("spec", "tolerations", 0, "effect"), "over/kustomization.yaml", 13),
        ("Pod", ("spec", "automountServiceAccountToken"), "over/kustomization.yaml", 14),
        ("Pod", ("spec", "containers", 0, "args", 0), "part/merge.yaml", 7),
        ("Pod", ("spec", "containers", 1, "image"), "over/kustomization.yaml", 4),
        ("Pod", ("spec", "serviceAccountName"), "base/pod.yaml", 7),
        ("Pod", ("spec", "nothing"), "base/pod.yaml", 6),
        ("ConfigMap", ("data", "told.yaml", "b"), "base/told.yaml", 2),
    ],
)
def test_lines_of_kustomizations(tmp_path: Path, kind: str, path: tuple[Any, ...], file: str, line: int) -> None:
    [rendered] = sets.read(overlay(tmp_path), None, None)
    [document] = rendered.manifests.kinds(kind)
    assert locate(document.at(*path), rendered.folder) == (tmp_path / file, line)


@needs_kubectl
@needs_crds
def test_a_folder_of_kustomizations_is_checked_leaf_by_leaf(tmp_path: Path) -> None:
    overlay(tmp_path)
    assert check(tmp_path, CRDS).sets == [str(tmp_path / "base"), str(tmp_path / "over")]


@needs_kubectl
@needs_crds
def test_a_kustomization_that_does_not_render_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    [finding] = check(tmp_path, CRDS).findings
    assert finding.rule == "cannot-be-read"
    assert "gone.yaml" in finding.message


@needs_crds
def test_without_kubectl_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "kustomization.yaml").write_text("resources: []\n")
    with pytest.raises(ConfigError, match="kubectl"):
        check(tmp_path, CRDS)


def test_without_crds_nothing_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--crds"):
        check(tmp_path, tmp_path / "none")


@needs_crds
def test_the_command(tmp_path: Path) -> None:
    file = written_to(tmp_path / "set.yaml", good())
    options = ["k8s", "check", str(file), "--crds", str(CRDS)]
    done = CliRunner().invoke(command_line, options)
    assert "nothing found" in done.output
    written_to(file, edited({f"{JOB}.backoffLimit": 0}))
    bad = CliRunner().invoke(command_line, [*options, "--format", "json"], standalone_mode=False)
    assert bad.return_value == 1
    [finding] = json.loads(bad.output)["findings"]
    assert finding["path"] == f"{JOB}.backoffLimit"
    told = Finding(**{**finding, "sets": ()})
    assert str(told).startswith(f"{file}:{told.line}: RayJob/train spec.backoffLimit: job-is-retried: ")
    local = CliRunner().invoke(command_line, [*options, "--profile", "local"], standalone_mode=False)
    assert local.return_value == 0


@needs_kubectl
@needs_crds
@pytest.mark.slow
def test_our_own_manifests() -> None:
    assert not check(ROOT / "k8s", CRDS).findings
