"""What only this project knows: its image, its jobs' scripts and configs, and where training may write."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement

import raymodels
from raymodels.config import Config, ServeConfig, load
from raymodels.errors import ConfigError
from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.mounted import APP, FLEETING, claim_of, config_text, images, in_image, mount_of
from raymodels.k8s.quantities import amount
from raymodels.k8s.workloads import Cluster, clusters, pods, ray_container

# [REGISTRY/]raymodels:0.1.0-ray2.60.0-cpu[-20261130][@sha256:...]
OURS = re.compile(
    r"(?:.*/)?raymodels:(?P<version>[^@-]+)-ray(?P<ray>[0-9.]+)-(?P<flavour>cpu|cuda)(?:-[\w.-]+)?(?:@.*)?"
)
OUR_NAME = re.compile(r"(.*/)?raymodels([:@].*)?")
RAYS = re.compile(r"(?:.*/)?ray(?:-[a-z]+)?:(?P<ray>[0-9]+\.[0-9]+\.[0-9]+[0-9a-z]*)(?:[-@].*)?")
TRAINING, SERVING = ("train.py", "evaluate.py", "prepare.py"), "serve.py"
SHARED_SCHEMES = ("s3://", "gs://", "gcs://", "abfs://", "az://", "hdfs://")
SINGLE_NODE = "raymodels/single-node"


@dataclass(frozen=True)
class Entry:
    """A RayJob's command, taken apart: ``python SCRIPT CONFIG [--set a.b=c]...`` or ``raymodels train ...``."""

    cluster: Cluster
    place: Place
    script: str
    config: str
    overrides: list[str]


def pinned_ray() -> str:
    """The version of Ray that this package asks for."""
    for text in importlib.metadata.requires("raymodels") or []:
        requirement = Requirement(text)
        if requirement.name == "ray":
            return str(requirement.specifier).removeprefix("==")
    raise ConfigError("raymodels is installed without its metadata: install it with pip")


def image_form(manifests: ManifestSet) -> Problems:
    for image in images(manifests):
        told = OURS.fullmatch(str(image.value))
        if OUR_NAME.fullmatch(str(image.value)) and told is None:
            yield image, f"{image.value} is not raymodels:VERSION-rayVERSION-cpu|cuda[-DATE]: nobody can tell its Ray"
        elif told and told["version"] != raymodels.__version__:
            yield (
                image,
                f"has raymodels {told['version']}, and these manifests are of {raymodels.__version__}: set that",
            )


def ray_version(manifests: ManifestSet) -> Problems:
    """The version that the operator is told, the image's, and the one this package pins."""
    for cluster in clusters(manifests):
        told, ours = cluster.spec.at("rayVersion"), False
        for group in cluster.groups:
            image = ray_container(group).at("image")
            found = OURS.fullmatch(str(image.value)) or RAYS.fullmatch(str(image.value))
            ours |= OURS.fullmatch(str(image.value)) is not None
            if found and told and found["ray"] != told.value:
                yield image, f"has Ray {found['ray']}, and rayVersion says {told.value}: make them equal"
        if ours and told.value != pinned_ray():
            yield told, f"is {told.value}, and raymodels needs {pinned_ray()}: set that"


def image_flavour(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        for container in pod.containers:
            told = OURS.fullmatch(str(container.at("image").value))
            gpus = amount(container.at("resources", "limits", "nvidia.com/gpu").value)
            if told and gpus and told["flavour"] == "cpu":
                yield container.at("image"), "is the CPU's image in a container that asks for GPUs: use -cuda"


def entries(manifests: ManifestSet) -> Iterator[Entry]:
    """The commands of jobs that run this project's scripts."""
    for cluster in _jobs(manifests):
        place = cluster.spec.document.at(*cluster.spec.path[:-1], "entrypoint")
        words = _words(place)
        scripts = [word for word in words[1:2] if word.endswith(".py")]
        if scripts and len(words) > 2:
            overrides = [word for before, word in pairwise(words) if before == "--set"]
            overrides += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
            yield Entry(cluster, place, scripts[0], words[2], overrides)


def _jobs(manifests: ManifestSet) -> list[Cluster]:
    """Of RayJobs and RayCronJobs whose head runs our image."""
    found = [cluster for cluster in clusters(manifests) if cluster.kind in ("RayJob", "RayCronJob")]
    return [cluster for cluster in found if OUR_NAME.fullmatch(str(ray_container(cluster.head).at("image").value))]


def _words(place: Place) -> list[str]:
    """An entrypoint, word by word; what the command line does as the script of the same name in the script's words."""
    try:
        words = shlex.split(str(place.value or ""))
    except ValueError:
        return []
    match words:
        case ["raymodels", command, *rest] if f"{command}.py" in (*TRAINING, SERVING):
            return ["python", f"{APP}/jobs/{command}.py", *rest]
    return words


def entrypoint_form(manifests: ManifestSet) -> Problems:
    for cluster in _jobs(manifests):
        place = cluster.spec.document.at(*cluster.spec.path[:-1], "entrypoint")
        words = _words(place)
        expected = "expected: python /app/jobs/NAME.py CONFIG [--set a.b=c]..."
        if not re.fullmatch("python3?", words[0] if words else "") or len(words) < 3:
            yield place, f"{place.value!r} is no command of this project; {expected}"
            continue
        rest = iter(words[3:])
        for word in rest:
            if word == "--set":
                word = next(rest, "")
            elif not word.startswith("--set="):
                yield place, f"has {word!r}, which the script does not know; {expected}"
            if "=" not in word:
                yield place, f"--set {word} has no =; {expected}"


def entrypoint_script(manifests: ManifestSet) -> Problems:
    """The script is in the image, and what it imports is."""
    for entry in entries(manifests):
        file = in_image(entry.script, manifests.app)
        if file is None and manifests.app is not None:
            yield entry.place, f"{entry.script} is not under /app, where the image has this repository: mend the path"
        elif file and not file.is_file():
            known = ", ".join(f"/app/jobs/{other.name}" for other in sorted(file.parent.glob("*.py")))
            yield entry.place, f"the image has no {entry.script}: {known or 'mend the path'}"
        elif file:
            for module in missing_imports(file):
                yield entry.place, f"{entry.script} imports {module}, which is not there: add it to the image"


def missing_imports(file: Path) -> list[str]:
    """The modules of ours that a file imports and that are not there."""
    tree = ast.parse(file.read_text("utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return sorted(module for module in named if module.startswith("raymodels") and not importable(module))


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def entrypoint_config(manifests: ManifestSet) -> Problems:
    for entry in entries(manifests):
        try:
            settings(entry, manifests)
        except ConfigError as error:
            yield entry.place, f"the config does not load: {error}"


def settings(entry: Entry, manifests: ManifestSet) -> Config | ServeConfig | None:
    """The config that a job runs with; None if its script takes none, or the repository is not there.

    Raises:
        ConfigError: it does not load.
    """
    name = Path(entry.script).name
    if name not in (*TRAINING, SERVING) or manifests.app is None:
        return None
    file = in_image(entry.config, manifests.app)
    if file is not None:
        return _loaded(file, entry.overrides, name)
    pod = entry.cluster.head.at("template", "spec")
    text = config_text(entry.config, ray_container(entry.cluster.head), pod, manifests)
    if text is None:
        raise ConfigError(f"nothing is at {entry.config}: name a file under /app, or mount a ConfigMap there")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(entry.config).name
        copy.write_text(str(text.value))
        return _loaded(copy, entry.overrides, name)


def _loaded(file: Path, overrides: list[str], script: str) -> Config | ServeConfig:
    return load(file, overrides, ServeConfig) if script == SERVING else load(file, overrides)


def trainings(manifests: ManifestSet) -> Iterator[tuple[Entry, Config]]:
    """The jobs whose config loads, each with it."""
    for entry in entries(manifests):
        try:
            config = settings(entry, manifests)
        except ConfigError:
            continue  # another rule's
        if isinstance(config, Config):
            yield entry, config


def storage_shared(manifests: ManifestSet) -> Problems:
    """Every pod of a job reads and writes the same places."""
    for entry, config in trainings(manifests):
        for key, uri in places(config).items():
            yield from not_shared(key, uri, entry.place, entry.cluster, manifests)


def places(config: Config) -> dict[str, str]:
    return {"run.storage": config.run.storage, "data.prepared": config.data.prepared, "registry": config.registry}


def not_shared(key: str, uri: str, told: Place, cluster: Cluster, manifests: ManifestSet) -> Problems:
    """Why a place is not the same in every pod of a cluster.

    Args:
        key: the setting that names it.
        told: where that setting is said.
    """
    if uri.startswith(SHARED_SCHEMES):
        return
    if not uri.startswith("/"):
        yield told, f"{key} is {uri}, which each pod has of its own: set it to a folder of a shared volume, or s3://"
        return
    for group in cluster.groups:
        pod, container = group.at("template", "spec"), ray_container(group)
        mount = mount_of(uri, container, pod)
        if mount is None:
            yield (
                container.at("volumeMounts"),
                f"{key} is {uri}, and no volume is mounted there: mount the shared claim",
            )
        elif mount.kind in FLEETING:
            text = f"{key} is {uri}, and {mount.kind} ends with its pod: nothing outlives the cluster; use a claim"
            yield mount.volume.at(mount.kind), text
        elif mount.place.at("readOnly").value is True and key != "model":
            yield mount.place.at("readOnly"), f"{key} is {uri}, which is written to: remove it"


def claim_shared(manifests: ManifestSet) -> Problems:
    """A claim that pods of several nodes write to."""
    for cluster in clusters(manifests):
        for group in cluster.groups:
            for mount in ray_container(group).each("volumeMounts"):
                found = mount_of(str(mount.at("mountPath").value), ray_container(group), group.at("template", "spec"))
                claim = claim_of(found, manifests) if found else None
                if claim is None or "ReadWriteMany" in (claim.at("spec", "accessModes").value or []):
                    continue
                single = claim.at("metadata", "annotations", SINGLE_NODE).value == "true"
                if manifests.production or not single:
                    text = "ReadWriteMany is missing: pods of several nodes mount it"
                    yield claim.at("spec", "accessModes"), f"{text}; add it, or annotate {SINGLE_NODE} in a local set"


def workers_fit(manifests: ManifestSet) -> Problems:
    """The group of a fixed gang holds the config's workers, and no GPU of it is idle."""
    for entry, config in trainings(manifests):
        if Path(entry.script).name != "train.py" or len(entry.cluster.workers) != 1:
            continue
        [group] = entry.cluster.workers
        pods_there, wanted = group.at("replicas").value or 0, config.workers
        limits = ray_container(group).at("resources", "limits")
        cpus, gpus = amount(limits.at("cpu").value) or 0, amount(limits.at("nvidia.com/gpu").value) or 0
        by_cpu = int(float(cpus) // wanted.cpus) * pods_there
        room = min(by_cpu, int(gpus) * pods_there) if wanted.gpus else by_cpu
        if room < wanted.least:
            text = f"holds {room} workers of {wanted.cpus:g} CPUs and {wanted.gpus} GPUs"
            text += f", and workers.count is {wanted.least}"
            yield group.at("replicas"), f"{text}: raise replicas or the pods' limits, or lower workers.count"
        elif gpus and isinstance(wanted.count, int) and wanted.gpus * wanted.count < int(gpus) * pods_there:
            text = f"has {int(gpus) * pods_there} GPUs, and workers.count uses {wanted.count * wanted.gpus}"
            yield group.at("replicas"), f"{text}: lower replicas, or raise workers.count"


SET_RULES = (
    image_form,
    ray_version,
    image_flavour,
    entrypoint_form,
    entrypoint_script,
    entrypoint_config,
    storage_shared,
    claim_shared,
    workers_fit,
)
