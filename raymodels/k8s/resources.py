"""What pods ask for: amounts, accelerators, shared memory, a queue's share; and values that no schema lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal

from raymodels.k8s.manifests import Document, ManifestSet, Place, Problems
from raymodels.k8s.mounted import mount_of
from raymodels.k8s.operator_jobs import QUEUE
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
    return any(_is_for(toleration, key) for toleration in pod.each("tolerations"))


def _is_for(toleration: Place, key: str) -> bool:
    """Whether a toleration is for a taint that keeps pods off nodes; what Equal compares with is not known here."""
    if toleration.at("effect").value not in (None, "", "NoSchedule"):
        return False
    if toleration.at("operator").value == "Exists":
        return toleration.at("key").value in (None, "", key)
    return toleration.at("key").value == key and bool(toleration.at("value"))


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
    """Ray's object store lies in /dev/shm; one that does not fit goes to the disk, or above 10 GB nowhere."""
    for cluster in clusters(manifests):
        for group in cluster.groups:
            told, container = group.at("rayStartParams", "object-store-memory"), ray_container(group)
            limit, room = amount(container.at("resources", "limits", "memory").value), _shared_memory(group)
            store = amount(told.value)
            if store is not None and limit is not None and store >= limit:
                yield told, f"{told.value} bytes are not within the memory limit: lower it"
            elif store is not None and room is not None and store > room:
                yield told, f"{told.value} bytes are more than the {room:f} of /dev/shm: lower it, or raise sizeLimit"
            elif not told and limit is not None and room is not None and _default_store(limit, room) > room:
                text = f"is not set, and Ray's default of {_default_store(limit, room):.0f} bytes is more than"
                yield told, f"{text} the {room:f} of /dev/shm: set it below that, or raise sizeLimit"


def _default_store(limit: Decimal, room: Decimal) -> Decimal:
    """What Ray takes for its object store of a container's memory, which has so much shared memory.

    Source: ray._private.utils.resolve_object_store_memory; memory that is used when Ray starts makes it a little less.
    """
    return min(limit * Decimal("0.3"), Decimal(200 * 10**9), max(Decimal(10**10), room * Decimal("0.95")))


def _shared_memory(group: Place) -> Decimal | None:
    """The size of a group's own /dev/shm; none where the operator mounts one, as large as the memory."""
    mount = mount_of("/dev/shm", ray_container(group), group.at("template", "spec"))
    if mount is None or mount.volume.at("emptyDir", "medium").value != "Memory":
        return None
    return amount(mount.volume.at("emptyDir", "sizeLimit").value)


def quota_fits(manifests: ManifestSet) -> Problems:
    """Kueue admits all pods of a workload together, or lets it wait for ever if its queue is too small for that."""
    for document in manifests.kinds("RayJob", "RayCluster"):
        name = f"{document.kind}/{document.name}"
        for queue in _cluster_queues(document, manifests):
            quotas = _quotas(queue)
            for resource, asked in _asked(document, manifests).items():
                there = quotas.get(resource, [])
                most = sum(amount(quota.value) or 0 for quota in there)
                if asked and not there:
                    told = f"cover no {resource}, which {name} asks for, so that it waits for ever: add it"
                    yield queue.at("spec", "resourceGroups"), told
                elif asked > most:
                    told = f"{name} asks for {float(asked):g} {resource} in all, and the queue has {float(most):g}"
                    yield max(there, key=lambda quota: amount(quota.value) or 0), f"{told}: raise it"


def _cluster_queues(document: Document, manifests: ManifestSet) -> list[Document]:
    """The set's queue that a workload waits in, unless it may borrow from others."""
    local = document.at("metadata", "labels", QUEUE).value
    names = [queue.at("spec", "clusterQueue").value for queue in manifests.kinds("LocalQueue") if queue.name == local]
    found = [queue for queue in manifests.kinds("ClusterQueue") if queue.name in names]
    return [queue for queue in found if not queue.at("spec", "cohortName") and not queue.at("spec", "cohort")]


def _quotas(queue: Document) -> dict[str, list[Place]]:
    """Of each resource that a queue covers, the share of every flavor."""
    found: dict[str, list[Place]] = defaultdict(list)
    for group in queue.at("spec").each("resourceGroups"):
        for flavor in group.each("flavors"):
            for resource in flavor.each("resources"):
                found[str(resource.at("name").value)].append(resource.at("nominalQuota"))
    return found


def _asked(document: Document, manifests: ManifestSet) -> dict[str, Decimal]:
    """What Kueue counts: the pods of the cluster, and the submitter where it is one; limits stand for requests."""
    total: dict[str, Decimal] = defaultdict(Decimal)
    submits = document.at("spec", "submissionMode").value in (None, "K8sJobMode")
    for pod in pods(manifests):
        if pod.document is not document or (pod.role == "submitter" and not submits):
            continue
        for container in pod.spec.each("containers"):
            limits, requests = (container.at("resources", kind).value or {} for kind in ("limits", "requests"))
            for resource, quantity in {**limits, **requests}.items():
                total[resource] += (amount(quantity) or 0) * pod.count
    return total


def value_unknown(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        for path, known in ONE_OF.items():
            if pod.spec.at(*path).value not in (None, *known):
                yield pod.spec.at(*path), f"{pod.spec.at(*path).value} is not one of {', '.join(known)}"
        for toleration in pod.spec.each("tolerations"):
            for key, known in TOLERATION.items():
                if toleration.at(key).value not in (None, "", *known):
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
    quota_fits,
    value_unknown,
)
