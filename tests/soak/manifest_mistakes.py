"""The mistakes of `manifest_mutations`: one per rule and per field of the production checklist, in our own overlays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

REMOVED = object()
KEY = re.compile(r'\["([^"]+)"\]|\[(\d+)\]|([^.\[\]]+)')


@dataclass(frozen=True)
class Mistake:
    what: str
    rule: str
    changes: dict[str, Any]
    """Where, as ``RayJob/train spec.backoffLimit``, to what is there then; without a path: a whole object."""
    at: str = ""
    overlay: str = "overlays/production-nightly"

    @property
    def path(self) -> str:
        """Where it is to be found: unless said, where the first change is."""
        return self.at or next(iter(self.changes))


def keys_of(path: str) -> list[Any]:
    return [int(index) if index else quoted or plain for quoted, index, plain in KEY.findall(path)]


def made(version: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "raymodels"}, **more}


JOB, SERVICE, NIGHTLY = "RayJob/train spec", "RayService/serve spec", "RayCronJob/evaluate spec"
TRAIN, SERVE = f"{JOB}.rayClusterSpec", f"{SERVICE}.rayClusterConfig"
TRAIN_HEAD, SERVE_HEAD = (f"{cluster}.headGroupSpec.template.spec" for cluster in (TRAIN, SERVE))
TRAIN_WORKERS, SERVE_WORKERS = (f"{cluster}.workerGroupSpecs[0]" for cluster in (TRAIN, SERVE))
TRAIN_POD, SERVE_POD = (f"{group}.template.spec" for group in (TRAIN_WORKERS, SERVE_WORKERS))
TRAINER, REPLICA = f"{TRAIN_POD}.containers[0]", f"{SERVE_POD}.containers[0]"
SERVED, CONFIG = f"{SERVICE}.serveConfigV2", 'ConfigMap/serve-config data["serve.yaml"]'
COMMAND = "python /app/jobs/train.py /app/jobs/configs/pretrain-1b.yaml"
INCREMENTAL, UPGRADE = "overlays/production-incremental", f"{SERVICE}.upgradeStrategy.clusterUpgradeOptions"
HPA = made(
    "autoscaling/v2",
    "HorizontalPodAutoscaler",
    "serve",
    spec={"maxReplicas": 9, "scaleTargetRef": {"apiVersion": "ray.io/v1", "kind": "RayService", "name": "serve"}},
)
DASHBOARD = {"service": {"name": "train-head-svc", "port": {"number": 8265}}}
INGRESS = made("networking.k8s.io/v1", "Ingress", "dashboard", spec={"defaultBackend": DASHBOARD})
BALANCER = made(
    "v1",
    "Service",
    "dashboard",
    spec={"type": "LoadBalancer", "selector": {"ray.io/node-type": "head"}, "ports": [{"port": 8265}]},
)
RESOURCES, REPLICAS = ("requests", "limits"), ("replicas", "minReplicas", "maxReplicas")
V2_ENV = {"name": "RAY_enable_autoscaler_v2", "value": "1"}
TOKEN_ENV = {"name": "RAY_AUTH_TOKEN", "value": "x"}
REDIS_ENV = {"name": "REDIS_PASSWORD", "value": "x"}
ORDER = [
    {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 600}},
    {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
]

MISTAKES = [
    # Schemas
    Mistake("a typo in a field", "unknown-field", {f"{TRAINER}.resourcez": {}}),
    Mistake("rayClusterConfig in a RayJob", "unknown-field", {f"{JOB}.rayClusterConfig": {}}),
    Mistake("a typo in a built-in kind", "unknown-field", {"PersistentVolumeClaim/shared spec.accessMode": "x"}),
    Mistake("a typo in a PodMonitor", "unknown-field", {"PodMonitor/ray-workers spec.podMetricsEndpoint": []}),
    Mistake("a typo in an alert", "unknown-field", {"PrometheusRule/training spec.groups[0].rules[0].expression": "1"}),
    Mistake("a group without a name", "missing-field", {f"{TRAIN_WORKERS}.groupName": REMOVED}),
    Mistake("text for a number", "schema", {f"{TRAIN_WORKERS}.replicas": "two"}),
    Mistake("an unknown autoscaler", "schema", {f"{SERVE}.autoscalerOptions.version": "v3"}),
    Mistake(
        "an alert that lasts for no time", "schema", {"PrometheusRule/training spec.groups[0].rules[0].for": "5min"}
    ),
    Mistake("a CEL rule broken", "cel", {f"{JOB}.managedBy": "someone"}),
    Mistake(
        "a kind that there is not", "unknown-kind", {"RayJobs/x": made("ray.io/v1", "RayJobs", "x")}, "RayJobs/x kind"
    ),
    # The operator's rules
    Mistake(
        "a name of 48 letters",
        "name-length",
        {f"{JOB[:-5]} metadata.name": "a" * 48},
        f"RayJob/{'a' * 48} metadata.name",
    ),
    Mistake("a name with a digit first", "name-form", {f"{JOB[:-5]} metadata.name": "1st"}, "RayJob/1st metadata.name"),
    Mistake("an alpha feature", "alpha-feature", {f"{TRAIN}.networkPolicy": {"mode": "DenyAll"}}),
    Mistake("no container", "container-missing", {f"{TRAIN_POD}.containers": []}),
    Mistake("resources said twice", "resources-twice", {f"{TRAIN}.headGroupSpec.resources": {"CPU": "0"}}),
    Mistake("labels as a parameter", "labels-as-params", {f"{TRAIN_WORKERS}.rayStartParams.labels": "a=b"}),
    Mistake("maxReplicas left out", "replica-bounds", {f"{TRAIN_WORKERS}.maxReplicas": REMOVED}),
    Mistake("least above most", "replica-bounds", {f"{SERVE_WORKERS}.minReplicas": 9}),
    Mistake("a group's idle timeout without v2", "group-idle-timeout", {f"{TRAIN_WORKERS}.idleTimeoutSeconds": 60}),
    Mistake("a restart policy with v2", "autoscaler-restart-policy", {f"{SERVE_POD}.restartPolicy": "Always"}),
    Mistake("v2 said twice", "autoscaler-env", {f"{SERVE_HEAD}.containers[0].env[1]": V2_ENV}),
    Mistake("a group suspended beside the autoscaler", "suspended-group", {f"{SERVE_WORKERS}.suspend": True}),
    Mistake(
        "the Redis password in the head's env",
        "redis-outside-options",
        {f"{SERVE_HEAD}.containers[0].env[1]": REDIS_ENV},
    ),
    Mistake(
        "fault tolerance by annotation too",
        "fault-tolerance-twice",
        {'RayService/serve metadata.annotations["ray.io/ft-enabled"]': "true"},
    ),
    Mistake("tokens of a Ray that has none", "token-needs-version", {f"{TRAIN}.rayVersion": "2.51.0"}),
    Mistake(
        "Kubernetes' tokens for a RayService", "kubernetes-tokens", {f"{SERVE}.authOptions.enableK8sTokenAuth": True}
    ),
    Mistake("an unknown submission mode", "submission-mode", {f"{JOB}.submissionMode": "K8sJob"}),
    Mistake("unquoted shell", "entrypoint-shell", {f"{JOB}.entrypoint": f"{COMMAND} && echo done"}),
    Mistake("a shell's variable", "entrypoint-shell", {f"{JOB}.entrypoint": f"{COMMAND} --set run.name=$NAME"}),
    Mistake(
        "a submitter beside SidecarMode",
        "sidecar-mode",
        {f"{JOB}.submissionMode": "SidecarMode"},
        f"{JOB}.submitterPodTemplate",
    ),
    Mistake("a deadline of 0", "deadlines", {f"{JOB}.activeDeadlineSeconds": 0}),
    Mistake("negative retries", "backoff-limit", {f"{JOB}.backoffLimit": -1}),
    Mistake(
        "a time to live without shutdown",
        "ttl-needs-shutdown",
        {f"{JOB}.shutdownAfterJobFinishes": False},
        f"{JOB}.ttlSecondsAfterFinished",
    ),
    Mistake("a queued job that keeps its quota", "kueue", {f"{JOB}.shutdownAfterJobFinishes": False}),
    Mistake("neither a cluster nor a selector", "one-cluster", {f"{JOB}.rayClusterSpec": REMOVED}),
    Mistake(
        "a job deleted before its cluster",
        "deletion-rules-order",
        {f"{NIGHTLY}.jobTemplate.deletionStrategy.deletionRules": ORDER},
        f"{NIGHTLY}.jobTemplate.deletionStrategy.deletionRules[1].condition.ttlSeconds",
    ),
    Mistake("a schedule in minute 61", "schedule", {f"{NIGHTLY}.schedule": "61 3 * * *"}),
    Mistake("an unknown upgrade", "upgrade-type", {f"{SERVICE}.upgradeStrategy.type": "Rolling"}),
    Mistake("a step above the surge", "incremental-upgrade", {f"{UPGRADE}.stepSizePercent": 101}, overlay=INCREMENTAL),
    Mistake(
        "an upgrade without its gateway",
        "incremental-upgrade",
        {f"{UPGRADE}.gatewayClassName": ""},
        overlay=INCREMENTAL,
    ),
    Mistake(
        "a head service with a name", "head-service-name", {f"{SERVE}.headGroupSpec.headService.metadata.name": "x"}
    ),
    # References
    Mistake("an account that there is not", "reference-missing", {f"{TRAIN_POD}.serviceAccountName": "trian"}),
    Mistake(
        "a claim that there is not",
        "reference-missing",
        {f"{TRAIN_POD}.volumes[0].persistentVolumeClaim.claimName": "x"},
    ),
    Mistake("a config map that there is not", "reference-missing", {f"{SERVE_POD}.volumes[2].configMap.name": "x"}),
    Mistake(
        "a secret that there is not",
        "reference-missing",
        {f"{SERVE}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name": "rediss"},
    ),
    Mistake(
        "a queue that there is not",
        "reference-missing",
        {'RayJob/train metadata.labels["kueue.x-k8s.io/queue-name"]': "x"},
    ),
    Mistake(
        "a claim taken out",
        "reference-missing",
        {"PersistentVolumeClaim/shared": REMOVED},
        f"{TRAIN_HEAD}.volumes[0].persistentVolumeClaim.claimName",
    ),
    Mistake("a mount without its volume", "volume-missing", {f"{TRAINER}.volumeMounts[0].name": "share"}),
    Mistake(
        "a volume nobody mounts",
        "volume-unused",
        {f"{TRAIN_POD}.volumes[2]": {"name": "x", "emptyDir": {}}},
        f"{TRAIN_POD}.volumes[2].name",
    ),
    Mistake(
        "a budget for no pod",
        "selects-nothing",
        {"PodDisruptionBudget/serve-head spec.selector": {"matchLabels": {"ray.io/node-type": "haed"}}},
    ),
    Mistake(
        "a policy for a cluster's generated name",
        "selects-nothing",
        {"NetworkPolicy/from-operator spec.podSelector": {"matchLabels": {"ray.io/cluster": "train"}}},
    ),
    Mistake(
        "a port that no pod has", "monitored-port", {"PodMonitor/ray-heads spec.podMetricsEndpoints[0].port": "metric"}
    ),
    Mistake("a service's port that no pod has", "service-port", {"Service/redis spec.ports[0].targetPort": 6380}),
    Mistake(
        "another autoscaler",
        "two-autoscalers",
        {"HorizontalPodAutoscaler/serve": HPA},
        "HorizontalPodAutoscaler/serve spec.scaleTargetRef.name",
    ),
    # Resources
    Mistake("a request above its limit", "requests-above-limits", {f"{TRAINER}.resources.requests.cpu": "80"}),
    Mistake(
        "GPUs asked for otherwise than limited",
        "accelerators-exact",
        {f'{TRAINER}.resources.requests["nvidia.com/gpu"]': "4"},
    ),
    Mistake("GPUs without a toleration", "gpu-toleration", {f"{TRAIN_POD}.tolerations": REMOVED}),
    Mistake(
        "a toleration that lets pods stay, not come",
        "gpu-toleration",
        {f"{TRAIN_POD}.tolerations": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoExecute"}]},
    ),
    Mistake(
        "shared memory above the limit", "shared-memory-fits", {f"{SERVE_POD}.volumes[1].emptyDir.sizeLimit": "65Gi"}
    ),
    Mistake("no quantity", "quantity-form", {f"{TRAINER}.resources.limits.cpu": "72 cores"}),
    Mistake("a toleration's wrong effect", "value-unknown", {f"{TRAIN_POD}.tolerations[0].effect": "NoSchedul"}),
    Mistake(
        "Ray's default object store",
        "store-fits",
        {f"{SERVE_WORKERS}.rayStartParams": {}},
        f"{SERVE_WORKERS}.rayStartParams.object-store-memory",
        overlay="overlays/local",
    ),
    Mistake(
        "eight nodes in the quota of four",
        "quota-fits",
        {f"{TRAIN_WORKERS}.{key}": 8 for key in REPLICAS},
        "ClusterQueue/raymodels spec.resourceGroups[0].flavors[1].resources[2].nominalQuota",
        overlay="overlays/production-multi-node",
    ),
    Mistake(
        "a device that the queue does not cover",
        "quota-fits",
        {f'{TRAINER}.resources.{key}["rdma/shared"]': "1" for key in RESOURCES},
        "ClusterQueue/raymodels spec.resourceGroups",
    ),
    # The project
    Mistake("version skew of rayVersion", "ray-version", {f"{SERVE}.rayVersion": "2.59.0"}),
    Mistake(
        "the CPU's image for GPUs",
        "image-flavour",
        {f"{TRAINER}.image": f"raymodels:0.1.0-ray2.60.0-cpu@sha256:{'0' * 64}"},
    ),
    Mistake(
        "an image of another raymodels",
        "image-form",
        {f"{TRAINER}.image": f"raymodels:0.0.9-ray2.60.0-cuda@sha256:{'0' * 64}"},
    ),
    Mistake(
        "a script that there is not",
        "entrypoint-script",
        {f"{JOB}.entrypoint": COMMAND.replace("train.py", "trane.py")},
    ),
    Mistake("a config that there is not", "entrypoint-config", {f"{JOB}.entrypoint": COMMAND.replace("1b", "1")}),
    Mistake(
        "an override that there is not", "entrypoint-config", {f"{JOB}.entrypoint": f"{COMMAND} --set train.step=4"}
    ),
    Mistake("an option that there is not", "entrypoint-form", {f"{JOB}.entrypoint": f"{COMMAND} --force"}),
    Mistake(
        "runs in the pod's own folder", "storage-shared", {f"{JOB}.entrypoint": f"{COMMAND} --set run.storage=./runs"}
    ),
    Mistake(
        "checkpoints in an emptyDir",
        "storage-shared",
        {f"{TRAIN_POD}.volumes[0]": {"name": "shared", "emptyDir": {}}},
        f"{TRAIN_POD}.volumes[0].emptyDir",
    ),
    Mistake(
        "a claim for one node", "claim-shared", {"PersistentVolumeClaim/shared spec.accessModes": ["ReadWriteOnce"]}
    ),
    Mistake(
        "more workers than fit",
        "workers-fit",
        {f"{JOB}.entrypoint": f"{COMMAND} --set publish.alias=prod --set workers.count=16"},
        f"{TRAIN_WORKERS}.replicas",
    ),
    Mistake("a typo in Serve's config", "serve-config-keys", {f"{SERVED}.applications[0].route_prefx": "/"}),
    Mistake(
        "least above most in Serve's config",
        "serve-config-values",
        {
            f"{SERVED}.applications[0].deployments": [
                {"name": "d", "autoscaling_config": {"min_replicas": 3, "max_replicas": 1}}
            ]
        },
        f"{SERVED}.applications[0].deployments[0].autoscaling_config",
    ),
    Mistake(
        "a typo in a runtime environment",
        "runtime-env-keys",
        {f"{JOB}.runtimeEnvYAML": "env_var: {A: b}"},
        f"{JOB}.runtimeEnvYAML.env_var",
    ),
    Mistake("proxies on the head alone", "proxy-location", {f"{SERVED}.proxy_location": "HeadOnly"}),
    Mistake("a port no container has", "serve-port", {f"{SERVED}.http_options.port": 8001}),
    Mistake(
        "an import path that there is not",
        "serve-import",
        {f"{SERVED}.applications[0].import_path": "raymodels.serve.deploy:app"},
    ),
    Mistake("a serve config that does not load", "application-config", {f"{CONFIG}.models[0].cpu": 1}, CONFIG),
    Mistake("a registry nobody publishes to", "registry-shared", {f"{CONFIG}.registry": "/mnt/shared/other"}),
    Mistake("a model nobody publishes", "model-published", {f"{CONFIG}.models[0].model": "corpus-7b@prod"}),
    Mistake("a replica larger than its pod", "replicas-fit", {f"{CONFIG}.models[0].gpus": 2}),
    Mistake("an old cluster that ends its requests", "drains", {f"{SERVICE}.rayClusterDeletionDelaySeconds": 60}),
    # The production checklist
    Mistake("a gang that is not fixed", "fixed-gang", {f"{TRAIN_WORKERS}.minReplicas": 0}),
    Mistake(
        "work on the head",
        "head-without-work",
        {f'{TRAIN}.headGroupSpec.rayStartParams["num-cpus"]': "2"},
        f"{TRAIN}.headGroupSpec.rayStartParams.num-cpus",
    ),
    Mistake(
        "no /dev/shm",
        "shared-memory-missing",
        {f"{TRAINER}.volumeMounts[1].mountPath": "/scratch"},
        f"{TRAINER}.volumeMounts",
    ),
    Mistake("no deadline", "job-deadlines", {f"{JOB}.activeDeadlineSeconds": REMOVED}),
    Mistake("no deadline for the start", "job-deadlines", {f"{JOB}.preRunningDeadlineSeconds": REMOVED}),
    Mistake("no retry", "job-is-retried", {f"{JOB}.backoffLimit": REMOVED}),
    Mistake("no autoscaler", "service-autoscales", {f"{SERVE}.enableInTreeAutoscaling": False}),
    Mistake("the old autoscaler", "service-autoscales", {f"{SERVE}.autoscalerOptions.version": "v1"}),
    Mistake(
        "no fault tolerance",
        "service-survives-its-head",
        {f"{SERVE}.gcsFaultToleranceOptions": REMOVED},
        f"{SERVE}.gcsFaultToleranceOptions.redisAddress",
    ),
    Mistake("requests through the head", "head-is-not-served", {f"{SERVICE}.excludeHeadPodFromServeSvc": False}),
    Mistake("a budget taken out", "disruption-budget-missing", {"PodDisruptionBudget/serve-head": REMOVED}, SERVE_HEAD),
    Mistake(
        "eight nodes in the budget of four",
        "budget-of-gang",
        {f"{TRAIN_WORKERS}.{key}": 8 for key in REPLICAS},
        "PodDisruptionBudget/train spec.minAvailable",
        overlay="overlays/production-multi-node",
    ),
    Mistake("a budget in percent", "budget-form", {"PodDisruptionBudget/serve-replicas spec.minAvailable": "50%"}),
    Mistake("replicas that are not spread", "topology-spread", {f"{SERVE_POD}.topologySpreadConstraints": REMOVED}),
    Mistake("root", "pod-security", {f"{TRAIN_POD}.securityContext.runAsNonRoot": False}),
    Mistake("no seccomp profile", "pod-security", {f"{TRAIN_POD}.securityContext.seccompProfile.type": "Unconfined"}),
    Mistake(
        "privilege escalation", "container-security", {f"{TRAINER}.securityContext.allowPrivilegeEscalation": True}
    ),
    Mistake("capabilities kept", "container-security", {f"{TRAINER}.securityContext.capabilities.drop": ["NET_RAW"]}),
    Mistake("a privileged container", "container-security", {f"{TRAINER}.securityContext.privileged": True}),
    Mistake(
        "no policy for a workload",
        "network-policy-missing",
        {"NetworkPolicy/default-deny": REMOVED, "NetworkPolicy/redis": REMOVED},
        "StatefulSet/redis spec.template.spec",
    ),
    Mistake(
        "a policy that lets all in",
        "open-policy",
        {"NetworkPolicy/from-operator spec.ingress[0].from": REMOVED},
        "NetworkPolicy/from-operator spec.ingress[0].ports[0].port",
    ),
    Mistake(
        "a policy for every address",
        "open-policy",
        {"NetworkPolicy/from-operator spec.ingress[0].from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]},
        "NetworkPolicy/from-operator spec.ingress[0].ports[0].port",
    ),
    Mistake(
        "a policy for every namespace",
        "open-policy",
        {"NetworkPolicy/from-operator spec.ingress[0].from": [{"namespaceSelector": {}}]},
        "NetworkPolicy/from-operator spec.ingress[0].ports[0].port",
    ),
    Mistake(
        "a range of ports with the dashboard's",
        "open-policy",
        {"NetworkPolicy/from-callers spec.ingress[0]": {"ports": [{"port": 8000, "endPort": 9000}]}},
        "NetworkPolicy/from-callers spec.ingress[0].ports[0].endPort",
    ),
    Mistake(
        "an endpoint that asks for no key", "endpoint-open", {f"{CONFIG}.http": REMOVED}, f"{CONFIG}.http.keys_file"
    ),
    Mistake(
        "the dashboard behind a load balancer",
        "public-service",
        {"Service/dashboard": BALANCER},
        "Service/dashboard spec.type",
    ),
    Mistake(
        "the dashboard behind an ingress",
        "public-route",
        {"Ingress/dashboard": INGRESS},
        "Ingress/dashboard spec.defaultBackend.service.port.number",
    ),
    Mistake(
        "the head behind a load balancer", "head-service-type", {f"{SERVE}.headGroupSpec.serviceType": "LoadBalancer"}
    ),
    Mistake("an account for two workloads", "own-account", {f"{SERVE_POD}.serviceAccountName": "train"}),
    Mistake("an account's token nobody needs", "account-token", {f"{TRAIN_POD}.automountServiceAccountToken": True}),
    Mistake("workers nobody watches", "monitor-missing", {"PodMonitor/ray-workers": REMOVED}, TRAIN_POD),
    Mistake(
        "no alerts",
        "alerts-missing",
        {"PrometheusRule/training": REMOVED, "PrometheusRule/serving": REMOVED},
        "RayCronJob/evaluate",
    ),
    Mistake("an image by its tag", "image-digest", {f"{TRAINER}.image": "raymodels:0.1.0-ray2.60.0-cuda"}),
    Mistake("no token", "ray-token", {f"{TRAIN}.authOptions": REMOVED}, f"{TRAIN}.authOptions.mode"),
    Mistake("no limit of memory", "amounts-missing", {f"{TRAINER}.resources.limits.memory": REMOVED}),
    Mistake("root by the container", "container-security", {f"{TRAINER}.securityContext.runAsNonRoot": False}),
    Mistake("a port of the node", "container-security", {f"{REPLICA}.ports[0].hostPort": 8000}),
    Mistake("a token in the manifest", "secret-shown", {f"{TRAINER}.env[1]": TOKEN_ENV}, f"{TRAINER}.env[1].value"),
    Mistake("the operator's submitter", "submitter-unconfined", {f"{JOB}.submitterPodTemplate": REMOVED}),
    Mistake(
        "no interface for NCCL",
        "fabric-settings",
        {f"{TRAIN_POD}.containers[0].env": [{"name": "NCCL_DEBUG", "value": "WARN"}]},
        overlay="overlays/production-multi-node",
    ),
    Mistake(
        "RDMA, and NCCL by TCP",
        "fabric-settings",
        {
            f"{TRAINER}.env": [{"name": name, "value": "x"} for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")],
            'Namespace/raymodels metadata.annotations["raymodels/profile"]': "production",
        },
        overlay="overlays/multi-node-roce",
    ),
]
