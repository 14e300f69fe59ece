"""What pods ask for: amounts, accelerators and the nodes that carry them, shared memory; and values no schema lists."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.quantities import amount
from raymodels.k8s.workloads import clusters, pods, ray_container

GPUS = ("nvidia.com/gpu", "amd.com/gpu", "habana.ai/gaudi")
# Resources that cannot be promised twice: what is asked for is what is given.
EXACT = (*GPUS, "google.com/tpu", "vpc.amazonaws.com/efa", "rdma/")
ONE_OF = {
    ("restartPolicy",): ("Always", "OnFailure", "Never"),
    ("dnsPolicy",): ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    ("securityContext", "seccompProfile", "type"): ("RuntimeDefault", "Localhost", "Unconfined"),
    ("securityContext", "fsGroupChangePolicy"): ("OnRootMismatch", "Always"),
}
TOLERATION = {"operator": ("Exists", "Equal"), "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute")}


def quantity_form(manifests: ManifestSet) -> Problems:
    for place in amounts(manifests):
        if amount(place.value) is None:
            yield place, f"{place.value!r} is no quantity, such as 500m, 2 or 8Gi"


def requests_above_limits(manifests: ManifestSet) -> Problems:
    for container in containers(manifests):
        requests, limits = container.at("resources", "requests"), container.at("resources", "limits")
        for request in requests.each():
            asked, most = amount(request.value), amount(limits.at(request.path[-1]).value)
            if asked is not None and most is not None and asked > most:
                yield request, f"{request.value} is more than the limit {limits.at(request.path[-1]).value}: lower it"


def accelerators_exact(manifests: ManifestSet) -> Problems:
    """Kubernetes refuses another request than the limit for devices, and a request alone."""
    for container in containers(manifests):
        requests, limits = container.at("resources", "requests"), container.at("resources", "limits")
        for name in sorted({str(place.path[-1]) for place in [*requests.each(), *limits.each()]}):
            if not name.startswith(EXACT):
                continue
            asked, most = requests.at(name), limits.at(name)
            if not most or (asked and amount(asked.value) != amount(most.value)):
                yield (
                    (asked if asked else most),
                    f"requests and limits of {name} must be equal: {asked.value}, {most.value}",
                )
            elif (told := amount(most.value)) is not None and told != int(told):
                yield most, f"{most.value} is no whole number of {name}"


def gpu_toleration(manifests: ManifestSet) -> Problems:
    """GPU nodes are tainted where they are managed; not every Kubernetes adds the toleration by itself."""
    for pod in pods(manifests):
        for container in pod.containers:
            for limit in container.each("resources", "limits"):
                name = limit.path[-1]
                if name in GPUS and amount(limit.value) and not _tolerates(pod.spec, str(name)):
                    told = (
                        f"the pod asks for {name}, whose nodes are tainted: tolerate it (key {name}, operator Exists)"
                    )
                    yield pod.spec.at("tolerations"), told


def _tolerates(pod: Place, key: str) -> bool:
    for toleration in pod.each("tolerations"):
        if toleration.at("operator").value == "Exists" and toleration.at("key").value in (None, key):
            return toleration.at("effect").value in (None, "NoSchedule")
        if toleration.at("key").value == key and toleration.at("value"):
            return True
    return False


def shared_memory_fits(manifests: ManifestSet) -> Problems:
    """What is written to an emptyDir in memory counts as the container's."""
    for pod in pods(manifests):
        for container in pod.spec.each("containers"):
            limit = amount(container.at("resources", "limits", "memory").value)
            mounted = {mount.at("name").value for mount in container.each("volumeMounts")}
            total = Decimal(0)
            for volume in pod.spec.each("volumes"):
                size = volume.at("emptyDir", "sizeLimit")
                if volume.at("emptyDir", "medium").value == "Memory" and volume.at("name").value in mounted:
                    total += amount(size.value) or 0
                    if limit is not None and total >= limit:
                        name = container.at("name").value
                        told = f"{size.value} in memory leaves nothing of the limit {limit:f} of {name}"
                        yield size, f"{told}: lower it, or raise the limit"


def store_fits(manifests: ManifestSet) -> Problems:
    """Ray's object store lies in /dev/shm, which without a volume of its own has 64 MB."""
    for cluster in clusters(manifests):
        for group in cluster.groups:
            told, container = group.at("rayStartParams", "object-store-memory"), ray_container(group)
            memory, limit = amount(told.value), amount(container.at("resources", "limits", "memory").value)
            if memory is not None and limit is not None and memory >= limit:
                yield told, f"{told.value} bytes are not within the memory limit: lower it"


def value_unknown(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        for path, known in ONE_OF.items():
            if pod.spec.at(*path).value not in (None, *known):
                yield pod.spec.at(*path), f"{pod.spec.at(*path).value} is not one of {', '.join(known)}"
        for toleration in pod.spec.each("tolerations"):
            for key, known in TOLERATION.items():
                if toleration.at(key).value not in (None, *known):
                    yield toleration.at(key), f"{toleration.at(key).value} is not one of {', '.join(known)}"
        for volume in pod.spec.each("volumes"):
            if volume.at("emptyDir", "medium").value not in (None, "", "Memory", "HugePages"):
                yield volume.at("emptyDir", "medium"), "is not Memory"
        for container in pod.containers:
            if container.at("imagePullPolicy").value not in (None, "Always", "IfNotPresent", "Never"):
                told = f"{container.at('imagePullPolicy').value} is not one of Always, IfNotPresent, Never"
                yield container.at("imagePullPolicy"), told


def autoscaler_container(manifests: ManifestSet) -> list[Place]:
    """The containers that KubeRay makes of a cluster's autoscalerOptions."""
    return [
        cluster.spec.at("autoscalerOptions") for cluster in clusters(manifests) if cluster.spec.at("autoscalerOptions")
    ]


def containers(manifests: ManifestSet) -> Iterator[Place]:
    for pod in pods(manifests):
        yield from pod.containers
    yield from autoscaler_container(manifests)


def amounts(manifests: ManifestSet) -> Iterator[Place]:
    for container in containers(manifests):
        for kind in ("requests", "limits"):
            yield from container.each("resources", kind)
    for pod in pods(manifests):
        for volume in pod.spec.each("volumes"):
            if volume.at("emptyDir", "sizeLimit"):
                yield volume.at("emptyDir", "sizeLimit")
    for claim in manifests.kinds("PersistentVolumeClaim"):
        yield from claim.at("spec").each("resources", "requests")


SET_RULES = (
    quantity_form,
    requests_above_limits,
    accelerators_exact,
    gpu_toleration,
    shared_memory_fits,
    store_fits,
    value_unknown,
)
