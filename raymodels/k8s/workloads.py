"""The pods and Ray clusters that a set of manifests makes, with the labels and ports that KubeRay gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from raymodels.k8s.manifests import Document, ManifestSet, Place

GENERATED = "generated-by-the-operator"
METRICS_PORT = "metrics"
TEMPLATES = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
JOBS = {"RayJob": ("spec",), "RayCronJob": ("spec", "jobTemplate")}
CLUSTERS = {
    "RayCluster": ("spec",),
    "RayService": ("spec", "rayClusterConfig"),
    **{kind: (*path, "rayClusterSpec") for kind, path in JOBS.items()},
}


@dataclass(frozen=True, eq=False)
class Cluster:
    """The spec of a Ray cluster, wherever it stands."""

    spec: Place

    @property
    def document(self) -> Document:
        return self.spec.document

    @property
    def kind(self) -> str:
        return self.document.kind

    @property
    def annotations(self) -> Place:
        return self.document.at("metadata", "annotations")

    @property
    def head(self) -> Place:
        return self.spec.at("headGroupSpec")

    @property
    def workers(self) -> list[Place]:
        return list(self.spec.each("workerGroupSpecs"))

    @property
    def groups(self) -> list[Place]:
        return [self.head, *self.workers]

    @property
    def autoscales(self) -> bool:
        return self.spec.at("enableInTreeAutoscaling").value is True

    @cached_property
    def head_env(self) -> dict[str, Place]:
        return environment(ray_container(self.head))

    @property
    def autoscaler_v2(self) -> bool:
        by_env = "RAY_enable_autoscaler_v2" in self.head_env and self.head_env["RAY_enable_autoscaler_v2"].at("value")
        return self.spec.at("autoscalerOptions", "version").value == "v2" or bool(
            by_env and by_env.value in ("1", "true")
        )


@dataclass(frozen=True, eq=False)
class Pod:
    spec: Place
    labels: dict[str, str]
    cluster: Cluster | None = None
    role: str = "plain"
    """head, worker, submitter or plain."""
    count: int = 1
    """How many of it a worker group starts with."""

    @property
    def document(self) -> Document:
        return self.spec.document

    @property
    def containers(self) -> list[Place]:
        return [*self.spec.each("initContainers"), *self.spec.each("containers")]

    @property
    def ports(self) -> set[Any]:
        """Numbers and names of its containers' ports."""
        listed = [port for container in self.containers for port in container.each("ports")]
        found = {port.at(key).value for port in listed for key in ("name", "containerPort")}
        return found | ({METRICS_PORT, 8080} if self.role in ("head", "worker") else set())


def environment(container: Place) -> dict[str, Place]:
    return {str(entry.at("name").value): entry for entry in container.each("env")}


def ray_container(group: Place) -> Place:
    return group.at("template", "spec", "containers", 0)


def jobs(manifests: ManifestSet) -> list[Place]:
    """The spec of every RayJob, those of RayCronJobs too."""
    return [document.at(*JOBS[document.kind]) for document in manifests.kinds(*JOBS)]


def clusters(manifests: ManifestSet) -> list[Cluster]:
    found = [document.at(*CLUSTERS[document.kind]) for document in manifests.kinds(*CLUSTERS)]
    return [Cluster(spec) for spec in found if isinstance(spec.value, dict)]


@lru_cache(16)
def pods(manifests: ManifestSet) -> tuple[Pod, ...]:
    return tuple(_pods(manifests))


def _pods(manifests: ManifestSet) -> Iterator[Pod]:
    for cluster in clusters(manifests):
        yield from _ray_pods(cluster)
    for job in jobs(manifests):
        template = job.at("submitterPodTemplate")
        if template:
            labels = {
                "ray.io/originated-from-cr-name": job.document.name,
                "ray.io/originated-from-crd": job.document.kind,
                "app.kubernetes.io/created-by": "kuberay-operator",
            }
            yield Pod(template.at("spec"), _labels(template) | labels, None, "submitter")
    for document in manifests.documents:
        if document.kind in TEMPLATES:
            template = document.at(*TEMPLATES[document.kind])
            yield Pod(template.at("spec"), _labels(template))
        elif document.kind not in CLUSTERS:
            yield from (Pod(template.at("spec"), _labels(template)) for template in _templates(document.root))


def _ray_pods(cluster: Cluster) -> Iterator[Pod]:
    name = cluster.document.name if cluster.kind == "RayCluster" else GENERATED
    for group in cluster.groups:
        role = "head" if group.path[-1] == "headGroupSpec" else "worker"
        fixed = {
            "ray.io/cluster": name,
            "ray.io/node-type": role,
            "ray.io/group": "headgroup" if role == "head" else str(group.at("groupName").value),
        }
        defaults = {
            "ray.io/is-ray-node": "yes",
            "ray.io/identifier": f"{name}-{role}",
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
        }
        if cluster.kind == "RayService":
            # The operator sets a head's to true as well, unless it is to be left out.
            left_out = role == "head" and cluster.document.at("spec", "excludeHeadPodFromServeSvc").value
            defaults["ray.io/serve"] = "false" if left_out else "true"
        own = _labels(group.at("template")) | (group.at("labels").value or {})
        count = 1 if role == "head" else (group.at("replicas").value or 0) * (group.at("numOfHosts").value or 1)
        yield Pod(group.at("template", "spec"), defaults | own | fixed, cluster, role, count)


def _templates(place: Place) -> Iterator[Place]:
    """The pod templates of a kind that is not known here."""
    if isinstance(place.at("spec", "containers").value, list):
        yield place
    elif isinstance(place.value, (dict, list)):
        for item in place.each():
            yield from _templates(item)


def _labels(template: Place) -> dict[str, str]:
    found = template.at("metadata", "labels").value
    return dict(found) if isinstance(found, dict) else {}
