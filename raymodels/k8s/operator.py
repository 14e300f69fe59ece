"""What KubeRay's operator refuses in a Ray cluster, wherever its spec stands, though the schema takes it.

Source: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, one function per rule.
"""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

from raymodels.k8s.manifests import FEATURE_GATES, ManifestSet, Place, Problems
from raymodels.k8s.workloads import Cluster, clusters, environment, ray_container

RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
V2_ENV = "RAY_enable_autoscaler_v2"
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]")
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def name_length(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds(*LONGEST_NAME):
        longest = LONGEST_NAME[document.kind]
        if len(document.name) > longest:
            told = (
                f"{len(document.name)} characters: a {document.kind}'s has at most {longest}, for names are made of it"
            )
            yield document.at("metadata", "name"), told


def name_form(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds(*LONGEST_NAME):
        if not DNS_1035.fullmatch(document.name) and not document.at("metadata", "generateName"):
            told = f"{document.name!r} is no DNS-1035 label: small letters, digits and hyphens, beginning with a letter"
            yield document.at("metadata", "name"), told


def alpha_feature(manifests: ManifestSet) -> Problems:
    """Features whose gate is off unless the operator is installed with it on."""
    used = [("RayCronJob", document.at("kind")) for document in manifests.kinds("RayCronJob")]
    for cluster in clusters(manifests):
        backend = cluster.spec.at("gcsFaultToleranceOptions", "backend")
        used += [("GCSFaultToleranceEmbeddedStorage", backend)] if backend.value == "rocksdb" else []
        for gate, key in (
            ("RayClusterNetworkPolicy", "networkPolicy"),
            ("RayClusterMTLS", "tlsOptions"),
            ("RayClusterHistoryServer", "historyServerOptions"),
        ):
            used += [(gate, cluster.spec.at(key))] if cluster.spec.at(key) else []
    for gate, place in used:
        if gate not in manifests.declared(FEATURE_GATES):
            told = f"needs the operator's feature gate {gate}, which is alpha and off"
            yield place, f"{told}: enable it, and say so in the annotation {FEATURE_GATES}"


def container_missing(cluster: Cluster) -> Problems:
    for group in cluster.groups:
        if not group.at("template", "spec", "containers").value:
            yield group.at("template", "spec", "containers"), "has no container: the first one is Ray's"


def resources_twice(cluster: Cluster) -> Problems:
    for group in cluster.groups:
        params = [key for key in RESOURCE_PARAMS if group.at("rayStartParams", key).value]
        if params and group.at("resources").value:
            told = f"excludes rayStartParams' {', '.join(params)}: say a group's resources in one of the two"
            yield group.at("resources"), told


def labels_as_params(cluster: Cluster) -> Problems:
    for group in cluster.groups:
        if "labels" in (group.at("rayStartParams").value or {}):
            yield group.at("rayStartParams", "labels"), "is refused: use the group's own labels"


def group_labels(cluster: Cluster) -> Problems:
    for group in cluster.groups:
        for key, value in (group.at("labels").value or {}).items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(str(value)):
                yield (
                    group.at("labels", key),
                    f"{key}: {value!r} is no valid Kubernetes label: letters, digits, -_. only",
                )


def replica_bounds(cluster: Cluster) -> Problems:
    for group in cluster.workers:
        for key in ("minReplicas", "maxReplicas"):
            if group.at(key).value is None:
                yield group.at(key), f"{key} is not set, and defaults silently: set it"
            elif isinstance(group.at(key).value, int) and group.at(key).value < 0:
                yield group.at(key), f"{key} is negative: set 0 or more"
        least, most = group.at("minReplicas").value, group.at("maxReplicas").value
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield group.at("minReplicas"), f"minReplicas {least} is more than maxReplicas {most}: lower it"


def replicas_outside_bounds(cluster: Cluster) -> Problems:
    for group in cluster.workers:
        count, least, most = (group.at(key).value for key in ("replicas", "minReplicas", "maxReplicas"))
        if all(isinstance(value, int) for value in (count, least, most)) and not least <= count <= most:
            yield group.at("replicas"), f"replicas {count} is outside of minReplicas {least} to maxReplicas {most}"


def group_name_twice(cluster: Cluster) -> Problems:
    names = [group.at("groupName").value for group in cluster.workers]
    for index, group in enumerate(cluster.workers):
        if names[index] in [*names[:index], "headgroup"]:
            yield (
                group.at("groupName"),
                f"{names[index]} names another group already: every group needs a name of its own",
            )


def group_idle_timeout(cluster: Cluster) -> Problems:
    for group in cluster.workers:
        idle = group.at("idleTimeoutSeconds")
        if idle.value is not None and not cluster.autoscaler_v2:
            yield idle, "needs autoscaler v2: set autoscalerOptions.version to v2, or remove it"
        if isinstance(idle.value, int) and idle.value < 0:
            yield idle, "is negative: set 0 or more"


def group_priority(cluster: Cluster) -> Problems:
    for group in cluster.workers:
        priority = group.at("priority")
        if priority.value and not (cluster.autoscaler_v2 and at_least(cluster, "2.56")):
            yield priority, "needs autoscaler v2 and rayVersion 2.56 or later: set both, or remove it"


def fault_tolerance_twice(cluster: Cluster) -> Problems:
    options = cluster.spec.at("gcsFaultToleranceOptions")
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if options and cluster.annotations.at(key).value:
            yield cluster.annotations.at(key), "is said by gcsFaultToleranceOptions: remove the annotation"


def redis_outside_options(cluster: Cluster) -> Problems:
    if not cluster.spec.at("gcsFaultToleranceOptions"):
        by_annotation = str(cluster.annotations.at("ray.io/ft-enabled").value).lower() == "true"
        if "RAY_REDIS_ADDRESS" in cluster.head_env and not by_annotation:
            told = "turns GCS fault tolerance on behind the operator's back: use gcsFaultToleranceOptions.redisAddress"
            yield cluster.head_env["RAY_REDIS_ADDRESS"], told
    else:
        for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
            if name in cluster.head_env:
                yield cluster.head_env[name], f"excludes gcsFaultToleranceOptions: use its {field}"
        if cluster.head.at("rayStartParams", "redis-password").value:
            place = cluster.head.at("rayStartParams", "redis-password")
            yield place, "excludes gcsFaultToleranceOptions: use its redisPassword"
    if cluster.head.at("rayStartParams", "redis-username").value:
        place = cluster.head.at("rayStartParams", "redis-username")
        yield place, "is refused: use gcsFaultToleranceOptions.redisUsername"
    if "REDIS_USERNAME" in cluster.head_env:
        yield cluster.head_env["REDIS_USERNAME"], "is refused: use gcsFaultToleranceOptions.redisUsername"


def fault_tolerance_backend(cluster: Cluster) -> Problems:
    options = cluster.spec.at("gcsFaultToleranceOptions")
    if options.at("backend").value == "rocksdb":
        for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if options.at(key):
                yield options.at(key), "belongs to the backend redis: remove it, or the backend rocksdb"
        if options.at("storage", "claimName") and len(options.at("storage").value) > 1:
            yield options.at("storage"), "claimName excludes size, storageClassName and accessModes: keep one of them"
        for name in cluster.head_env.keys() & {"RAY_gcs_storage", "RAY_gcs_storage_path"}:
            yield cluster.head_env[name], "is set by the operator with the backend rocksdb: remove it"
    elif options.at("storage"):
        yield options.at("storage"), "belongs to the backend rocksdb: remove it"


def autoscaler_env(cluster: Cluster) -> Problems:
    told = cluster.head_env.get(V2_ENV)
    if told is None:
        return
    if not cluster.autoscales and told.at("value").value in ("1", "true"):
        yield told, "is set though enableInTreeAutoscaling is not: remove it, or enable autoscaling"
    elif cluster.autoscales and cluster.spec.at("autoscalerOptions", "version"):
        yield told, "excludes autoscalerOptions.version: remove it"


def autoscaler_command(cluster: Cluster) -> Problems:
    found = environment(cluster.spec.at("autoscalerOptions"))
    if (name := "KUBERAY_GEN_AUTOSCALER_START_CMD") in found:
        yield found[name], "is set by the operator: remove it"


def autoscaler_idle_timeout(cluster: Cluster) -> Problems:
    idle = cluster.spec.at("autoscalerOptions", "idleTimeoutSeconds")
    if isinstance(idle.value, int) and idle.value < 0:
        yield idle, "is negative: set 0 or more"


def autoscaler_restart_policy(cluster: Cluster) -> Problems:
    if cluster.autoscales and cluster.autoscaler_v2:
        for group in cluster.groups:
            policy = group.at("template", "spec", "restartPolicy")
            if policy.value not in (None, "Never"):
                yield policy, f"{policy.value} is refused with autoscaler v2: set Never, or remove it"


def suspended_group(cluster: Cluster) -> Problems:
    for group in cluster.workers:
        if cluster.autoscales and group.at("suspend").value:
            yield group.at("suspend"), "a group cannot be suspended with autoscaling: disable one of the two"


def token_needs_version(cluster: Cluster) -> Problems:
    auth, version = cluster.spec.at("authOptions"), cluster.spec.at("rayVersion")
    if auth.at("mode").value == "token" and not at_least(cluster, "2.52"):
        yield version, f"authOptions.mode token needs rayVersion 2.52 or later, not {version.value}: set it"
    kubernetes = auth.at("enableK8sTokenAuth")
    if kubernetes.value and auth.at("mode").value != "token":
        yield kubernetes, "needs authOptions.mode token: set it"
    elif kubernetes.value and (not at_least(cluster, "2.55") or auth.at("secretName").value):
        yield kubernetes, "needs rayVersion 2.55 or later, and excludes authOptions.secretName: mend these"


def kubernetes_tokens(cluster: Cluster) -> Problems:
    place = cluster.spec.at("authOptions", "enableK8sTokenAuth")
    if place.value and cluster.kind != "RayCluster":
        yield place, f"is refused for a {cluster.kind}: use authOptions.mode token alone"


def cluster_upgrade_strategy(cluster: Cluster) -> Problems:
    place = cluster.spec.at("upgradeStrategy", "type")
    if place and cluster.kind != "RayCluster":
        yield place, f"is refused within a {cluster.kind}: it belongs to a RayCluster of one's own"
    elif place and place.value not in ("Recreate", "None"):
        yield place, f"{place.value} is not one of Recreate, None"


def operators_tls(cluster: Cluster) -> Problems:
    """Env variables that the operator sets itself where tlsOptions is given."""
    if cluster.spec.at("tlsOptions"):
        for container in [*map(ray_container, cluster.groups), cluster.spec.at("autoscalerOptions")]:
            found = environment(container)
            for name in sorted(found.keys() & set(TLS_ENV)):
                yield found[name], "is set by the operator with tlsOptions: remove it"


def network_policy_mode(cluster: Cluster) -> Problems:
    policy = cluster.spec.at("networkPolicy")
    mode = policy.at("mode").value or "DenyAll"
    groups = {group.at("groupName").value for group in cluster.workers}
    for part in [policy.at("head"), policy.at("worker"), *policy.each("workerGroups")]:
        if mode == "DenyAllEgress" and part.at("ingressRules").value:
            yield part.at("ingressRules"), f"mode {mode} does not restrict ingress: remove these, or set DenyAll"
        if mode == "DenyAllIngress" and part.at("egressRules").value:
            yield part.at("egressRules"), f"mode {mode} does not restrict egress: remove these, or set DenyAll"
    for part in policy.each("workerGroups"):
        if part.at("groupName").value not in groups:
            yield part.at("groupName"), "names no worker group: set one of " + ", ".join(map(str, groups))


def at_least(cluster: Cluster, version: str) -> bool:
    return newer(cluster.spec.at("rayVersion"), version)


def newer(place: Place, version: str) -> bool:
    """Whether the version at a place is ``version`` or later; none is not."""
    try:
        return Version(str(place.value)) >= Version(version)
    except InvalidVersion:
        return False


SET_RULES = (name_length, name_form, alpha_feature)
CLUSTER_RULES = (
    container_missing,
    resources_twice,
    labels_as_params,
    group_labels,
    replica_bounds,
    replicas_outside_bounds,
    group_name_twice,
    group_idle_timeout,
    group_priority,
    fault_tolerance_twice,
    redis_outside_options,
    fault_tolerance_backend,
    autoscaler_env,
    autoscaler_command,
    autoscaler_idle_timeout,
    autoscaler_restart_policy,
    suspended_group,
    token_needs_version,
    kubernetes_tokens,
    cluster_upgrade_strategy,
    operators_tls,
    network_policy_mode,
)
