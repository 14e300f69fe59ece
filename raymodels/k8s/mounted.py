"""What lies at a path in a container: a file of the image, an entry of a ConfigMap, a volume."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raymodels.k8s.manifests import ManifestSet, Place
from raymodels.k8s.workloads import pods

APP = PurePosixPath("/app")
# Volumes that end with their pod, or stay on the node it happened to run on.
FLEETING = ("emptyDir", "ephemeral", "hostPath", "configMap", "secret", "downwardAPI", "projected")


@dataclass(frozen=True)
class Mount:
    place: Place
    """Of the container's volumeMounts."""
    volume: Place

    @property
    def kind(self) -> str:
        """The volume's kind, such as emptyDir; empty if the pod has no such volume."""
        return next((str(key) for key in self.volume.value or {} if key != "name"), "")


def mount_of(path: str, container: Place, pod: Place) -> Mount | None:
    """The mount that a path in a container lies on: the nearest above it."""
    found = []
    for mount in container.each("volumeMounts"):
        root = posixpath.normpath(str(mount.at("mountPath").value))
        if PurePosixPath(path).is_relative_to(root):
            named = (v for v in pod.each("volumes") if v.at("name").value == mount.at("name").value)
            found.append((len(root), Mount(mount, next(named, Place(pod.document, (*pod.path, "volumes"), None)))))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def config_text(path: str, container: Place, pod: Place, manifests: ManifestSet) -> Place | None:
    """The ConfigMap's entry that a path in a container shows, or None if no ConfigMap of the set is mounted there."""
    mount = mount_of(path, container, pod)
    if mount is None or mount.kind != "configMap":
        return None
    root, sub = str(mount.place.at("mountPath").value), mount.place.at("subPath").value
    key = sub or posixpath.relpath(path, root)
    for item in mount.volume.each("configMap", "items"):
        if item.at("path").value == key:
            key = item.at("key").value
    for document in manifests.kinds("ConfigMap"):
        if document.name == mount.volume.at("configMap", "name").value and document.at("data", key):
            return document.at("data", key)
    return None


def in_image(path: str, app: Path | None) -> Path | None:
    """The repository's file that the image carries at a path; None where it is elsewhere, or the repository is."""
    full = PurePosixPath(posixpath.normpath(posixpath.join(str(APP), path)))
    if app is None or not full.is_relative_to(APP):
        return None
    return app / full.relative_to(APP)


def claim_of(mount: Mount, manifests: ManifestSet) -> Place | None:
    """Where the set makes the claim that a mount shows, if it does."""
    name = mount.volume.at("persistentVolumeClaim", "claimName").value
    found = (claim for claim in manifests.kinds("PersistentVolumeClaim") if claim.name == name)
    return next((claim.root for claim in found), None)


def images(manifests: ManifestSet) -> list[Place]:
    return [container.at("image") for pod in pods(manifests) for container in pod.containers if container.at("image")]
