"""The production checklist: what a set must have unless its Namespace's annotation `raymodels/profile` says local."""

from __future__ import annotations

import re

from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.quantities import amount
from raymodels.k8s.resources import containers
from raymodels.k8s.selectors import selects
from raymodels.k8s.workloads import JOBS, Pod, clusters, environment, jobs, pods, ray_container

DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
SECRET = re.compile(r"(.*_)?(TOKEN|PASSWORD|PASSWD|SECRET|ACCESS_KEY|API_KEY)")
# What NCCL needs to be told beside the devices; without it, it falls back to TCP and says so only in its log.
FABRICS = {"vpc.amazonaws.com/efa": ["FI_PROVIDER"], "rdma/": ["NCCL_IB_HCA", "NCCL_NET"]}


def fixed_gang(manifests: ManifestSet) -> Problems:
    """A training's world is fixed: elastic runs name their range to Ray Train, not to the cluster."""
    for cluster in clusters(manifests):
        for group in cluster.workers if cluster.kind in ("RayJob", "RayCronJob") else []:
            count = group.at("replicas")
            for key in ("minReplicas", "maxReplicas"):
                if group.at(key).value != count.value:
                    yield group.at(key), f"{key} must equal replicas ({count.value}), for the workers to start together"


def head_without_work(manifests: ManifestSet) -> Problems:
    for cluster in clusters(manifests):
        place = cluster.head.at("rayStartParams", "num-cpus")
        if place.value != "0" and str(cluster.head.at("resources", "CPU").value) != "0":
            yield place, 'is not "0": workers on the head would take it with them when they run out of memory'


def shared_memory_missing(manifests: ManifestSet) -> Problems:
    for cluster in clusters(manifests):
        for group in cluster.groups:
            pod, container = group.at("template", "spec"), ray_container(group)
            mounted = {mount.at("name").value for mount in container.each("volumeMounts") if _shm(mount)}
            volumes = [volume for volume in pod.each("volumes") if volume.at("name").value in mounted]
            if not volumes:
                yield container.at("volumeMounts"), "has no /dev/shm: mount an emptyDir of medium Memory there"
            for volume in volumes:
                if volume.at("emptyDir", "medium").value != "Memory":
                    yield volume.at("emptyDir", "medium"), "/dev/shm is not in memory: set Memory"
                elif not volume.at("emptyDir", "sizeLimit"):
                    yield (
                        volume.at("emptyDir", "sizeLimit"),
                        "/dev/shm has no sizeLimit: set one below the memory limit",
                    )


def _shm(mount: Place) -> bool:
    return str(mount.at("mountPath").value).rstrip("/") == "/dev/shm"


def job_deadlines(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayJob", "RayCronJob"):
        job = document.at("spec", "jobTemplate") if document.kind == "RayCronJob" else document.at("spec")
        for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if not job.at(key):
                yield job.at(key), f"{key} is not set: a job that hangs, or never starts, keeps its nodes for ever"


def job_is_retried(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayJob"):
        if not document.at("spec", "backoffLimit").value:
            yield document.at("spec", "backoffLimit"), "is not set: a lost head ends the run; set 1 or more, it resumes"


def job_cleans_up(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayJob", "RayCronJob"):
        job = document.at("spec", "jobTemplate") if document.kind == "RayCronJob" else document.at("spec")
        if not job.at("shutdownAfterJobFinishes").value and not job.at("deletionStrategy") and job.at("rayClusterSpec"):
            yield job.at("shutdownAfterJobFinishes"), "is not true: the cluster keeps its nodes after the job's end"


def service_autoscales(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayService"):
        cluster = document.at("spec", "rayClusterConfig")
        if cluster.at("enableInTreeAutoscaling").value is not True:
            yield (
                cluster.at("enableInTreeAutoscaling"),
                "is not true: Serve's replicas would find no worker to start on",
            )
        if cluster.at("autoscalerOptions", "version").value != "v2":
            yield cluster.at("autoscalerOptions", "version"), "is not v2: set it"


def service_survives_its_head(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayService"):
        options = document.at("spec", "rayClusterConfig", "gcsFaultToleranceOptions")
        if options.at("backend").value == "rocksdb":
            continue
        if not options.at("redisAddress").value:
            yield options.at("redisAddress"), "is not set: a lost head takes the service with it; name a Redis"
        secret = options.at("redisPassword", "valueFrom", "secretKeyRef")
        if not secret.value:
            yield secret, "is not set: anybody in the network could write Ray's state; name a Secret's key"


def head_is_not_served(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayService"):
        place = document.at("spec", "excludeHeadPodFromServeSvc")
        if place.value is not True:
            yield place, "is not true: requests would go through the head, which does no work and must not fail"


def disruption_budget_missing(manifests: ManifestSet) -> Problems:
    for pod in _service_pods(manifests):
        budgets = manifests.kinds("PodDisruptionBudget")
        if not any(selects(budget.at("spec", "selector"), pod.labels) for budget in budgets):
            told = f"no PodDisruptionBudget selects the {pod.role} pods: draining nodes may evict all of them at once"
            yield pod.spec, told


def topology_spread(manifests: ManifestSet) -> Problems:
    for pod in _service_pods(manifests):
        if pod.role == "worker" and not pod.spec.at("topologySpreadConstraints").value:
            told = "is not set: all replicas may land on one node or zone; spread them"
            yield pod.spec.at("topologySpreadConstraints"), told


def spread_selects_itself(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        for constraint in pod.spec.each("topologySpreadConstraints"):
            if not selects(constraint.at("labelSelector"), pod.labels):
                yield (
                    constraint.at("labelSelector"),
                    "does not select the pod itself, which is then not spread: mend it",
                )


def _service_pods(manifests: ManifestSet) -> list[Pod]:
    return [pod for pod in pods(manifests) if pod.cluster and pod.cluster.kind == "RayService"]


def pod_security(manifests: ManifestSet) -> Problems:
    for pod in pods(manifests):
        context = pod.spec.at("securityContext")
        if context.at("runAsNonRoot").value is not True:
            yield context.at("runAsNonRoot"), "is not true: set it, with a runAsUser other than 0"
        if context.at("seccompProfile", "type").value != "RuntimeDefault":
            yield context.at("seccompProfile", "type"), "is not RuntimeDefault: set it"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.at(key).value:
                yield pod.spec.at(key), "opens the node to the pod: remove it"
        for volume in pod.spec.each("volumes"):
            if volume.at("hostPath"):
                yield volume.at("hostPath"), "opens the node's files to the pod: use another kind of volume"


def root_user(manifests: ManifestSet) -> Problems:
    for place in [*(pod.spec for pod in pods(manifests)), *containers(manifests)]:
        user = place.at("securityContext", "runAsUser")
        if user.value == 0 and isinstance(user.value, int):
            yield user, "is root: set another, such as the image's 1000"


def container_security(manifests: ManifestSet) -> Problems:
    for container in containers(manifests):
        context = container.at("securityContext")
        if context.at("allowPrivilegeEscalation").value is not False:
            yield context.at("allowPrivilegeEscalation"), "is not false: set it"
        if "ALL" not in (context.at("capabilities", "drop").value or []):
            yield context.at("capabilities", "drop"), "does not drop ALL: set [ALL]"
        if context.at("capabilities", "add").value:
            yield context.at("capabilities", "add"), "gives a capability back: remove it"
        if context.at("privileged").value:
            yield context.at("privileged"), "gives the container the node: remove it"
        if context.at("runAsNonRoot").value is False:
            yield context.at("runAsNonRoot"), "takes back what the pod says: remove it"
        if context.at("seccompProfile", "type").value not in (None, "RuntimeDefault"):
            yield context.at("seccompProfile", "type"), "takes back what the pod says: remove it"
        for port in container.each("ports"):
            if port.at("hostPort").value:
                yield port.at("hostPort"), "opens the port on the node's own address: remove it"


def amounts_missing(manifests: ManifestSet) -> Problems:
    for container in containers(manifests):
        for kind in ("requests", "limits"):
            for name in ("cpu", "memory"):
                place = container.at("resources", kind, name)
                if amount(place.value) is None:
                    yield (
                        place,
                        f"is not set: without it the pod is evicted first, or starves its neighbours; set {kind}",
                    )


def own_account(manifests: ManifestSet) -> Problems:
    owners: dict[str, str] = {}
    for pod in pods(manifests):
        account = pod.spec.at("serviceAccountName")
        owner = f"{pod.spec.document.kind}/{pod.spec.document.name}"
        if account.value in (None, "default"):
            yield account, "is not set, and every workload needs an account of its own: name one"
        elif owners.setdefault(account.value, owner) != owner:
            yield account, f"{account.value} is {owners[account.value]}'s: give each workload an account of its own"


def account_token(manifests: ManifestSet) -> Problems:
    """Only a head whose autoscaler asks Kubernetes for pods needs the account's token."""
    for pod in pods(manifests):
        place = pod.spec.at("automountServiceAccountToken")
        needs = pod.cluster is not None and pod.role == "head" and pod.cluster.autoscales
        if place.value is not False and not needs:
            yield place, "is not false: the pod does not talk to Kubernetes"
        elif place.value is False and needs:
            yield place, "is false, but the head's autoscaler talks to Kubernetes: set true"


def image_digest(manifests: ManifestSet) -> Problems:
    for container in containers(manifests):
        image = container.at("image")
        if image and not DIGEST.fullmatch(str(image.value)):
            yield image, f"{image.value} may change under its tag: add @sha256:... as the registry tells it"


def ray_token(manifests: ManifestSet) -> Problems:
    for cluster in clusters(manifests):
        place = cluster.spec.at("authOptions", "mode")
        if place.value != "token":
            yield place, "is not token: whoever reaches the cluster runs code in it; set it"
    for pod in pods(manifests):
        for container in pod.containers if pod.role != "plain" else []:
            told = environment(container).get("RAY_AUTH_MODE")
            if told is not None and told.at("value").value != "token":
                yield told.at("value"), "takes back what authOptions.mode says: remove it"


def secret_shown(manifests: ManifestSet) -> Problems:
    for container in containers(manifests):
        for name, entry in environment(container).items():
            if SECRET.fullmatch(name.upper()) and entry.at("value").value:
                yield entry.at("value"), f"{name} can be read in the manifest: set valueFrom.secretKeyRef"
    for document in manifests.kinds("Secret"):
        for key in ("data", "stringData"):
            if document.at(key).value:
                told = "can be read in the manifest: make the Secret by kubectl, and name it in raymodels/external"
                yield document.at(key), told


def submitter_unconfined(manifests: ManifestSet) -> Problems:
    """The submitter that the operator makes by itself has the default account and no securityContext."""
    for job in jobs(manifests):
        if job.at("submissionMode").value in (None, "K8sJobMode") and not job.at("submitterPodTemplate"):
            told = "is not set, and the operator's own pod is not confined: give it an account and a securityContext"
            yield job.at("submitterPodTemplate"), told


def fabric_settings(manifests: ManifestSet) -> Problems:
    """Over which interface the GPUs of several pods meet, and how they use the fabric's devices."""
    for cluster in clusters(manifests):
        for group in cluster.workers if cluster.kind in JOBS else []:
            container = ray_container(group)
            limits, told = container.at("resources", "limits"), environment(container)
            several = amount(limits.at("nvidia.com/gpu").value) and (group.at("replicas").value or 0) > 1
            wanted = ["NCCL_SOCKET_IFNAME"] if several else []
            for device, names in FABRICS.items():
                wanted += names if any(str(limit.path[-1]).startswith(device) for limit in limits.each()) else []
            for name in wanted:
                if name not in told:
                    yield container.at("env"), f"{name} is not set: NCCL may take another way than the pods' fabric"
                elif name == "NCCL_NET" and not str(told[name].at("value").value).startswith("IB"):
                    yield told[name].at("value"), "leaves the devices idle: set IB, and NCCL fails where it cannot"


SET_RULES = (
    fixed_gang,
    head_without_work,
    shared_memory_missing,
    job_deadlines,
    job_is_retried,
    job_cleans_up,
    service_autoscales,
    service_survives_its_head,
    head_is_not_served,
    disruption_budget_missing,
    topology_spread,
    spread_selects_itself,
    pod_security,
    root_user,
    container_security,
    amounts_missing,
    own_account,
    account_token,
    image_digest,
    ray_token,
    secret_shown,
    submitter_unconfined,
    fabric_settings,
)
