"""The Kubernetes manifests: valid against KubeRay's own schemas, and true to this repository."""

import ast
import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

import raymodels
from raymodels.config import Config, ServeConfig, load, validate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared/kuberay"
OVERLAYS = ["base", "overlays/gpu"]
Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """What ``kubectl kustomize`` makes of the few features that are used here."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert told.keys() <= {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    found: list[Manifest] = []
    for resource in told["resources"]:
        path = folder / resource
        # Through JSON, so that what YAML anchors share is copied.
        found += render(path) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    for patch in told.get("patches", []):
        [target] = [m for m in found if {"kind": m["kind"], "name": m["metadata"]["name"]} == patch["target"]]
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            apply(target, **operation)
    for manifest in found:
        if "namespace" in told and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = told["namespace"]
        for container in containers(manifest):
            for image in told.get("images", []):
                if container["image"].rpartition(":")[0] == image["name"]:
                    container["image"] = f"{image['name']}:{image['newTag']}"
    return found


def apply(target: Any, op: str, path: str, value: Any) -> None:
    *parents, last = path.lstrip("/").split("/")
    for key in parents:
        target = target[int(key) if isinstance(target, list) else key]
    assert op in ("add", "replace"), op
    assert (last in target) == (op == "replace"), f"{op} {path}"
    target[last] = copy.deepcopy(value)


def containers(node: Any) -> Iterator[dict[str, Any]]:
    for pod in pods(node):
        yield from pod["containers"]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec anywhere in a manifest."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(ROOT / "k8s" / request.param)


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    [found] = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found


def clusters(manifests: list[Manifest]) -> list[Manifest]:
    return [
        one(manifests, "RayJob")["spec"]["rayClusterSpec"],
        one(manifests, "RayService")["spec"]["rayClusterConfig"],
    ]


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMGT]i)?", str(quantity)).groups()  # type: ignore[union-attr]
    scale = {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * scale[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_the_same(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    theirs = list(yaml.safe_load_all(done.stdout))
    key = lambda m: (m["kind"], m["metadata"]["name"])  # noqa: E731
    assert sorted(theirs, key=key) == sorted(render(ROOT / "k8s" / overlay), key=key)


def strict(schema: Any) -> Any:
    """An OpenAPI schema in which fields it does not name are errors, unless it says that it keeps them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    told = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not keeps:
        told["additionalProperties"] = False
    return told


def crd_schema(kind: str) -> dict[str, Any]:
    with (CRDS / f"ray.io_{kind.lower()}s.yaml").open() as file:
        crd = yaml.load(file, yaml.CSafeLoader)
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    if not CRDS.is_dir():
        pytest.skip("KubeRay's CRDs are not beside the repository, in ../shared/kuberay")
    return {kind: Draft202012Validator(crd_schema(kind)) for kind in ("RayJob", "RayService")}


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_kuberay_accepts(manifests: list[Manifest], schemas: dict[str, Draft202012Validator], kind: str) -> None:
    schemas[kind].validate(one(manifests, kind))


def test_the_check_is_strict(schemas: dict[str, Draft202012Validator]) -> None:
    job = one(render(ROOT / "k8s/base"), "RayJob")
    [container] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    container["resourcez"] = {}
    with pytest.raises(ValidationError, match="resourcez"):
        schemas["RayJob"].validate(job)


def test_versions_agree(manifests: list[Manifest]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [pin] = {r.partition("==")[2] for r in project["project"]["optional-dependencies"]["train"] if r.startswith("ray[")}
    images = {container["image"] for container in containers(manifests)}
    [image] = images
    assert re.fullmatch(rf"raymodels:{re.escape(raymodels.__version__)}-ray{re.escape(pin)}-(cpu|cuda)", image)
    assert {cluster["rayVersion"] for cluster in clusters(manifests)} == {pin}


def test_the_entrypoint_runs(manifests: list[Manifest]) -> None:
    entrypoint = one(manifests, "RayJob")["spec"]["entrypoint"]
    assert not set("&;|$<>`'\"\\\n") & set(entrypoint)
    python, script, _, *rest = shlex.split(entrypoint)
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    config_of(manifests)
    assert set(rest[::2]) <= {"--set"}


def config_of(manifests: list[Manifest]) -> Config:
    """The config that the RayJob trains with."""
    _, _, config, *rest = shlex.split(one(manifests, "RayJob")["spec"]["entrypoint"])
    return load(ROOT / Path(config).relative_to("/app"), rest[1::2])


def serve_config_of(manifests: list[Manifest]) -> ServeConfig:
    raw = yaml.safe_load(one(manifests, "ConfigMap", "serve-config")["data"]["serve.yaml"])
    return validate(raw, ServeConfig)


def test_results_go_to_the_shared_volume(manifests: list[Manifest]) -> None:
    config = config_of(manifests)
    for place in (config.run.storage, config.data.prepared, config.registry, serve_config_of(manifests).registry):
        assert place.startswith("/mnt/shared/")
    assert config.registry == serve_config_of(manifests).registry


def test_what_is_trained_is_what_is_served(manifests: list[Manifest]) -> None:
    publish = config_of(manifests).publish
    assert publish
    [model] = serve_config_of(manifests).models
    assert model.model == f"{publish.name}@{publish.alias}"


def test_the_workers_fit_their_pods(manifests: list[Manifest]) -> None:
    workers = config_of(manifests).workers
    [group] = one(manifests, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    per_pod = workers.count // group["replicas"]
    assert workers.count == per_pod * group["replicas"]
    assert per_pod * workers.cpus <= amount(limits["cpu"])
    assert per_pod * workers.gpus == amount(limits.get("nvidia.com/gpu", "0"))


def test_replicas_fit_their_pods(manifests: list[Manifest]) -> None:
    config = serve_config_of(manifests)
    [model] = config.models
    [group] = one(manifests, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert model.cpus + config.http.gateway_cpus <= amount(limits["cpu"])
    assert model.gpus <= amount(limits.get("nvidia.com/gpu", "0"))
    assert model.autoscaling.max_replicas <= group["maxReplicas"]


def test_the_service_imports_what_is_there(manifests: list[Manifest]) -> None:
    service = one(manifests, "RayService")["spec"]
    served = yaml.safe_load(service["serveConfigV2"])
    [application] = served["applications"]
    module, _, name = application["import_path"].partition(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    worker = service["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    mounted = Path(application["args"]["config"])
    assert str(mounted.parent) in {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert mounted.name in one(manifests, "ConfigMap", "serve-config")["data"]
    assert served["http_options"]["port"] in {port["containerPort"] for port in worker["ports"]}


def test_serve_knows_every_key(manifests: list[Manifest]) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    served = yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])
    deploy = schema.ServeDeploySchema.model_validate(served)
    assert served.keys() <= type(deploy).model_fields.keys()
    assert served["http_options"].keys() <= type(deploy.http_options).model_fields.keys()
    for raw, application in zip(served["applications"], deploy.applications, strict=True):
        assert raw.keys() <= type(application).model_fields.keys()


def test_old_replicas_live_as_long_as_their_requests(manifests: list[Manifest]) -> None:
    delay = one(manifests, "RayService")["spec"]["rayClusterDeletionDelaySeconds"]
    assert delay > serve_config_of(manifests).http.request_timeout_s


def test_what_is_referenced_exists(manifests: list[Manifest]) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for pod in pods(manifests):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names


def test_pods_are_confined(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    for cluster in clusters(manifests):
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert "serviceType" not in cluster["headGroupSpec"]


def test_requests_are_within_limits(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        sizes = [amount(v["emptyDir"]["sizeLimit"]) for v in pod.get("volumes", []) if "emptyDir" in v]
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() == limits.keys()
            assert all(amount(requests[kind]) <= amount(limits[kind]) for kind in limits)
            assert sum(sizes) < amount(limits["memory"])  # /dev/shm counts as the container's memory


def test_names_are_short_enough(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 47
