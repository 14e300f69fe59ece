"""What manifests name and must be there: objects of the set, volumes, pods that selectors mean.

Objects made elsewhere are declared in the annotation `raymodels/external`, as Kind/name.
"""

from __future__ import annotations

from collections.abc import Iterator

from raymodels.k8s.manifests import EXTERNAL, Document, ManifestSet, Place, Problems
from raymodels.k8s.operator_service import INCREMENTAL
from raymodels.k8s.selectors import monitored, selects
from raymodels.k8s.workloads import CLUSTERS, Pod, clusters, environment, pods

ALWAYS_THERE = {
    ("ServiceAccount", "default"),
    ("ConfigMap", "kube-root-ca.crt"),
    ("PriorityClass", "system-cluster-critical"),
    ("PriorityClass", "system-node-critical"),
    ("ClusterRole", "view"),
    ("ClusterRole", "edit"),
    ("ClusterRole", "admin"),
    ("ClusterRole", "cluster-admin"),
}
SCALERS = {
    "HorizontalPodAutoscaler": "scaleTargetRef",
    "ScaledObject": "scaleTargetRef",
    "VerticalPodAutoscaler": "targetRef",
}

# Mounted by containers that an admission webhook adds.
SIDECARS = ("gke-gcsfuse-",)

Reference = tuple[str, Place]


def same_object_twice(manifests: ManifestSet) -> Problems:
    seen = set()
    for document in manifests.documents:
        namespace = document.at("metadata", "namespace").value
        key = (document.group, document.kind, namespace, document.name)
        if key in seen and not document.at("metadata", "generateName"):
            yield (
                document.at("metadata", "name"),
                f"{document.kind}/{document.name} is there already: rename one of them",
            )
        seen.add(key)


def namespaces_differ(manifests: ManifestSet) -> Problems:
    """What names another object means one of its own namespace."""
    named = {document.name for document in manifests.kinds("Namespace")}
    for document in manifests.documents:
        place = document.at("metadata", "namespace")
        if (
            place
            and named
            and place.value not in named
            and f"Namespace/{place.value}" not in manifests.declared(EXTERNAL)
        ):
            yield place, f"the set makes no namespace {place.value}: use {', '.join(sorted(named))}, or add it"


def reference_missing(manifests: ManifestSet) -> Problems:
    for kind, place in _references(manifests):
        if (kind, place.value) not in ALWAYS_THERE and not manifests.has(kind, place.value):
            told = f"the set has no {kind}/{place.value}: add it, or if it is made elsewhere name it in the annotation"
            yield place, f"{told} {EXTERNAL}"


def external_unused(manifests: ManifestSet) -> Problems:
    used = {f"{kind}/{place.value}" for kind, place in _references(manifests)}
    used |= {f"Namespace/{document.at('metadata', 'namespace').value}" for document in manifests.documents}
    for document in manifests.documents:
        place = document.at("metadata", "annotations", EXTERNAL)
        for name in sorted(manifests.declared(EXTERNAL) - used) if place else []:
            if name in str(place.value):
                yield place, f"nothing of the set references {name}: remove it, or mend its Kind/name"


def key_missing(manifests: ManifestSet) -> Problems:
    """A key of a ConfigMap or Secret of the set that something reads, and that it does not have."""
    for pod in pods(manifests):
        for container in pod.containers:
            for entry in environment(container).values():
                for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                    source = entry.at("valueFrom", field)
                    yield from _key(manifests, kind, source.at("name"), source.at("key"), source)
        for volume in pod.spec.each("volumes"):
            for field, kind, name in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
                for item in volume.each(field, "items"):
                    yield from _key(manifests, kind, volume.at(field, name), item.at("key"), volume.at(field))


def _key(manifests: ManifestSet, kind: str, name: Place, key: Place, source: Place) -> Problems:
    made = [document for document in manifests.kinds(kind) if document.name == name.value]
    known = {k for d in made for part in ("data", "stringData", "binaryData") for k in d.at(part).value or {}}
    if made and key.value not in known and not source.at("optional").value:
        yield key, f"{kind}/{name.value} has no key {key.value}: it has {', '.join(sorted(known)) or 'none'}"


def volume_missing(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        known = {volume.at("name").value for volume in pod.spec.each("volumes")}
        if pod.document.kind == "StatefulSet":
            known |= {
                claim.at("metadata", "name").value for claim in pod.document.at("spec").each("volumeClaimTemplates")
            }
        for mount in _mounts(manifests, pod):
            if mount.at("name").value not in known:
                told = f"the pod has no volume {mount.at('name').value}: it has {', '.join(map(str, known)) or 'none'}"
                yield mount.at("name"), told


def volume_unused(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        mounted = {mount.at("name").value for mount in _mounts(manifests, pod)}
        for volume in pod.spec.each("volumes"):
            name = str(volume.at("name").value)
            if name not in mounted and not name.startswith(SIDECARS):
                yield volume.at("name"), f"no container mounts {volume.at('name').value}: mount it, or remove it"


def mount_path_twice(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        for container in pod.containers:
            seen = set()
            for mount in container.each("volumeMounts"):
                path = mount.at("mountPath")
                if path.value in seen:
                    yield path, f"{path.value} is mounted twice: give each mount a path of its own"
                seen.add(path.value)


def _mounts(manifests: ManifestSet, pod: Pod) -> Iterator[Place]:
    for container in pod.containers:
        yield from container.each("volumeMounts")
        yield from container.each("volumeDevices")
    if pod.role == "head" and pod.cluster:  # the autoscaler is a container of the head's pod
        yield from pod.cluster.spec.each("autoscalerOptions", "volumeMounts")


def selects_nothing(manifests: ManifestSet) -> Problems:
    """A selector that means no pod of the set is a typing error."""
    there = [pod.labels for pod in pods(manifests)] + _others_pods(manifests)
    for place in _selectors(manifests.documents):
        if not any(selects(place, labels) for labels in there):
            yield place, f"selects no pod of the set: {place.value}; mend its labels"


def _others_pods(manifests: ManifestSet) -> list[dict[str, str]]:
    """The labels of pods that no manifest describes: the Redis cleanup's, and those of a Gateway's controller.

    The operator makes a Gateway for an incremental upgrade.
    """
    names = [gateway.name for gateway in manifests.kinds("Gateway")]
    for service in manifests.kinds("RayService"):
        if service.at("spec", "upgradeStrategy", "type").value == INCREMENTAL:
            names.append(f"{service.name}-gateway")
    heads = [pod.labels for pod in pods(manifests) if pod.role == "head" and pod.cluster and _redis(pod.cluster.spec)]
    cleanups = [labels | {"ray.io/node-type": "redis-cleanup"} for labels in heads]
    return cleanups + [{"gateway.networking.k8s.io/gateway-name": name} for name in names]


def _redis(cluster: Place) -> bool:
    return bool(cluster.at("gcsFaultToleranceOptions", "redisAddress").value)


def _selectors(documents: list[Document]) -> Iterator[Place]:
    for document in documents:
        if document.kind in ("PodDisruptionBudget", "PodMonitor"):
            yield document.at("spec", "selector")
        elif document.kind == "NetworkPolicy":
            yield document.at("spec", "podSelector")
        elif document.kind == "Service" and document.at("spec", "selector").value:
            yield document.at("spec", "selector")


def service_port(manifests: ManifestSet) -> Problems:
    """A Service's target port that no pod it selects listens on."""
    there = pods(manifests)
    for document in manifests.kinds("Service"):
        chosen = [pod for pod in there if selects(document.at("spec", "selector"), pod.labels)]
        for port in document.at("spec").each("ports"):
            target = port.at("targetPort") if port.at("targetPort") else port.at("port")
            if chosen and not any(target.value in pod.ports for pod in chosen):
                yield target, f"no container of the pods it selects has the port {target.value}: add it to their ports"


def monitored_port(manifests: ManifestSet) -> Problems:
    """A port that a PodMonitor scrapes and no pod it selects has."""
    there = pods(manifests)
    for document in manifests.kinds("PodMonitor"):
        chosen = monitored(document, there)
        for endpoint in document.at("spec").each("podMetricsEndpoints"):
            for key in ("port", "portNumber", "targetPort"):
                port = endpoint.at(key)
                if port and chosen and not any(port.value in pod.ports for pod in chosen):
                    yield port, f"no container of the pods it selects has the port {port.value}: name one of theirs"


def _references(manifests: ManifestSet) -> Iterator[Reference]:
    for pod in pods(manifests):
        yield from _of_pod(pod)
    for cluster in clusters(manifests):
        yield from _of_cluster(cluster.spec)
    for document in manifests.documents:
        yield from _of_object(document)


def _of_pod(pod: Pod) -> Iterator[Reference]:
    account, priority = pod.spec.at("serviceAccountName"), pod.spec.at("priorityClassName")
    found = [("ServiceAccount", account), ("PriorityClass", priority)]
    found += [("Secret", secret.at("name")) for secret in pod.spec.each("imagePullSecrets")]
    for volume in pod.spec.each("volumes"):
        found.append(("PersistentVolumeClaim", volume.at("persistentVolumeClaim", "claimName")))
        sources = [volume, *volume.each("projected", "sources")]
        for source in sources:
            found += _unless_optional("ConfigMap", source.at("configMap"), "name")
            found += _unless_optional("Secret", source.at("secret"), "secretName" if source is volume else "name")
        secret = volume.at("csi", "nodePublishSecretRef", "name")
        found.append(("Secret", secret))
    for container in pod.containers:
        for entry in container.each("env"):
            found += _unless_optional("ConfigMap", entry.at("valueFrom", "configMapKeyRef"), "name")
            found += _unless_optional("Secret", entry.at("valueFrom", "secretKeyRef"), "name")
        for source in container.each("envFrom"):
            found += _unless_optional("ConfigMap", source.at("configMapRef"), "name")
            found += _unless_optional("Secret", source.at("secretRef"), "name")
    yield from ((kind, place) for kind, place in found if place.value)


def _unless_optional(kind: str, source: Place, key: str) -> list[Reference]:
    return [] if source.at("optional").value else [(kind, source.at(key))]


def _of_cluster(spec: Place) -> Iterator[Reference]:
    options = spec.at("gcsFaultToleranceOptions")
    for key in ("redisPassword", "redisUsername"):
        yield from (
            found
            for found in _unless_optional("Secret", options.at(key, "valueFrom", "secretKeyRef"), "name")
            if found[1]
        )
    if options.at("storage", "claimName"):
        yield "PersistentVolumeClaim", options.at("storage", "claimName")
    if spec.at("authOptions", "secretName").value:
        yield "Secret", spec.at("authOptions", "secretName")
    for entry in spec.each("autoscalerOptions", "env"):
        yield from (
            found for found in _unless_optional("Secret", entry.at("valueFrom", "secretKeyRef"), "name") if found[1]
        )


def _of_object(document: Document) -> Iterator[Reference]:
    spec = document.at("spec")
    queue = document.at("metadata", "labels", "kueue.x-k8s.io/queue-name")
    if queue:
        yield "LocalQueue", queue
    priority = document.at("metadata", "labels", "kueue.x-k8s.io/priority-class")
    if priority:
        yield "WorkloadPriorityClass", priority
    if document.kind == "LocalQueue" and spec.at("clusterQueue"):
        yield "ClusterQueue", spec.at("clusterQueue")
    if document.kind == "ClusterQueue":
        for group in spec.each("resourceGroups"):
            yield from (("ResourceFlavor", flavor.at("name")) for flavor in group.each("flavors"))
    if document.kind == "Gateway":
        yield "GatewayClass", spec.at("gatewayClassName")
    if document.kind == "HTTPRoute":
        yield from (("Gateway", parent.at("name")) for parent in spec.each("parentRefs"))
    if document.kind == "RayService" and spec.at("upgradeStrategy", "clusterUpgradeOptions", "gatewayClassName"):
        yield "GatewayClass", spec.at("upgradeStrategy", "clusterUpgradeOptions", "gatewayClassName")
    if document.kind in ("RoleBinding", "ClusterRoleBinding"):
        if document.at("roleRef", "name"):
            yield str(document.at("roleRef", "kind").value), document.at("roleRef", "name")
        for subject in document.root.each("subjects"):
            if subject.at("kind").value == "ServiceAccount":
                yield "ServiceAccount", subject.at("name")
    if document.kind in SCALERS and spec.at(SCALERS[document.kind], "name"):
        yield str(spec.at(SCALERS[document.kind], "kind").value), spec.at(SCALERS[document.kind], "name")
    if document.kind == "PodMonitor":
        for endpoint in spec.each("podMetricsEndpoints"):
            for way in ("authorization", "bearerTokenSecret"):
                secret = endpoint.at(way, "credentials") if way == "authorization" else endpoint.at(way)
                yield from (found for found in _unless_optional("Secret", secret, "name") if found[1])


def two_autoscalers(manifests: ManifestSet) -> Problems:
    """The Ray autoscaler and another one would undo each other's work."""
    for document in manifests.kinds(*SCALERS):
        target = document.at("spec", SCALERS[document.kind])
        for cluster in manifests.kinds(*CLUSTERS):
            if (target.at("kind").value, target.at("name").value) == (cluster.kind, cluster.name):
                told = (
                    f"{cluster.kind}/{cluster.name} is sized by Ray's autoscaler or its own replicas: remove this one"
                )
                yield target.at("name"), told


SET_RULES = (
    same_object_twice,
    namespaces_differ,
    reference_missing,
    external_unused,
    key_missing,
    volume_missing,
    volume_unused,
    mount_path_twice,
    selects_nothing,
    service_port,
    monitored_port,
    two_autoscalers,
)
