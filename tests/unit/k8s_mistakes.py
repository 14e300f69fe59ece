"""Mistakes put into the good set: the rule that is to find each, what is changed, and where it is found."""

from __future__ import annotations

from typing import Any

from tests.unit.k8s_set import EXTERNAL, IMAGE, REMOVED, container, made

JOB, SERVICE = "RayJob/train spec", "RayService/serve spec"
TRAIN, SERVE = f"{JOB}.rayClusterSpec", f"{SERVICE}.rayClusterConfig"
TRAIN_HEAD, SERVE_HEAD = (f"{cluster}.headGroupSpec.template.spec" for cluster in (TRAIN, SERVE))
TRAIN_WORKERS, SERVE_WORKERS = (f"{cluster}.workerGroupSpecs[0]" for cluster in (TRAIN, SERVE))
TRAIN_POD, SERVE_POD = (f"{group}.template.spec" for group in (TRAIN_WORKERS, SERVE_WORKERS))
NIGHTLY, SERVED = "RayCronJob/evaluate spec", f"{SERVICE}.serveConfigV2"
CONFIG = 'ConfigMap/serve-config data["serve.yaml"]'
NEXT = {
    "name": "next",
    "import_path": "raymodels.serve.deploy:version",
    "route_prefix": None,
    "args": {"config": "/etc/raymodels/x.yaml", "model": "python-demo"},
}
V2 = {"name": "RAY_enable_autoscaler_v2", "value": "1"}
LONG = "a" * 48
TRAIN_COMMAND = "python /app/jobs/train.py /app/jobs/configs/demo.yaml"
SHARED = "--set run.storage=/mnt/shared/r --set data.prepared=/mnt/shared/p --set registry=/mnt/shared/registry"

GPU_QUOTA = "ClusterQueue/pool spec.resourceGroups[0].flavors[0].resources[2]"


def queued(gpus: int = 2, resources: tuple[str, ...] = ("cpu", "memory", "nvidia.com/gpu"), **more: Any) -> Any:
    """The job in a queue of just its size: a head, two workers of a GPU each, the submitter."""
    sizes = {"cpu": "13", "memory": "25Gi", "nvidia.com/gpu": str(gpus)}
    quotas = [{"name": name, "nominalQuota": sizes[name]} for name in resources]
    group = {"coveredResources": list(resources), "flavors": [{"name": "pool", "resources": quotas}]}
    kueue = "kueue.x-k8s.io/v1beta2"
    return {
        'RayJob/train metadata.labels["kueue.x-k8s.io/queue-name"]': "training",
        "local": made(kueue, "LocalQueue", "training", spec={"clusterQueue": "pool"}),
        "queue": made(kueue, "ClusterQueue", "pool", spec={"resourceGroups": [group], **more}),
        "flavor": made(kueue, "ResourceFlavor", "pool", spec={}),
    }


def budgeted(least: int) -> Any:
    """A budget for the job's pods alone, which are three."""
    label = {"app": "train"}
    return {
        f"{TRAIN}.headGroupSpec.template.metadata.labels": label,
        f"{TRAIN_WORKERS}.template.metadata.labels": label,
        "x": made(
            "policy/v1",
            "PodDisruptionBudget",
            "gang",
            spec={"minAvailable": least, "selector": {"matchLabels": label}},
        ),
    }


# Rule, what is changed, and where it is found if that is not the first of what is changed.
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("name-length", {"RayJob/train metadata.name": LONG}, f"RayJob/{LONG} metadata.name"),
    ("name-form", {"RayJob/train metadata.name": "1st"}, "RayJob/1st metadata.name"),
    (
        "alpha-feature",
        {'Namespace/raymodels metadata.annotations["raymodels/feature-gates"]': REMOVED},
        "RayCronJob/evaluate kind",
    ),
    ("alpha-feature", {f"{TRAIN}.networkPolicy": {"mode": "DenyAll"}}, None),
    ("container-missing", {f"{TRAIN_POD}.containers": []}, None),
    ("resources-twice", {f"{TRAIN}.headGroupSpec.resources": {"CPU": "0"}}, None),
    ("labels-as-params", {f"{TRAIN_WORKERS}.rayStartParams.labels": "a=b"}, None),
    ("group-labels", {f'{TRAIN_WORKERS}.labels["a b"]': "c"}, None),
    ("replica-bounds", {f"{TRAIN_WORKERS}.maxReplicas": REMOVED}, None),
    ("replica-bounds", {f"{SERVE_WORKERS}.minReplicas": 9}, None),
    ("replicas-outside-bounds", {f"{SERVE_WORKERS}.replicas": 7}, None),
    ("group-name-twice", {f"{TRAIN_WORKERS}.groupName": "headgroup"}, None),
    ("group-idle-timeout", {f"{TRAIN_WORKERS}.idleTimeoutSeconds": 60}, None),
    ("group-priority", {f"{TRAIN_WORKERS}.priority": 3}, None),
    ("fault-tolerance-twice", {'RayService/serve metadata.annotations["ray.io/ft-enabled"]': "true"}, None),
    ("redis-outside-options", {f"{SERVE_HEAD}.containers[0].env[0]": {"name": "REDIS_PASSWORD", "value": "x"}}, None),
    ("fault-tolerance-backend", {f"{SERVE}.gcsFaultToleranceOptions.storage": {"size": "1Gi"}}, None),
    ("autoscaler-env", {f"{TRAIN_HEAD}.containers[0].env[0]": V2}, None),
    ("autoscaler-env", {f"{SERVE_HEAD}.containers[0].env[0]": V2}, None),
    ("autoscaler-command", {f"{SERVE}.autoscalerOptions.env[0]": {"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}}, None),
    ("autoscaler-idle-timeout", {f"{SERVE}.autoscalerOptions.idleTimeoutSeconds": -1}, None),
    ("autoscaler-restart-policy", {f"{SERVE_POD}.restartPolicy": "Always"}, None),
    ("suspended-group", {f"{SERVE_WORKERS}.suspend": True}, None),
    ("token-needs-version", {f"{TRAIN}.rayVersion": "2.51.0"}, None),
    (
        "token-needs-version",
        {f"{TRAIN}.authOptions": {"enableK8sTokenAuth": True}},
        f"{TRAIN}.authOptions.enableK8sTokenAuth",
    ),
    ("kubernetes-tokens", {f"{SERVE}.authOptions.enableK8sTokenAuth": True}, None),
    ("cluster-upgrade-strategy", {f"{TRAIN}.upgradeStrategy.type": "Recreate"}, None),
    (
        "operators-tls",
        {f"{TRAIN}.tlsOptions": {}, f"{TRAIN_HEAD}.containers[0].env[0]": {"name": "RAY_USE_TLS"}},
        f"{TRAIN_HEAD}.containers[0].env[0]",
    ),
    (
        "network-policy-mode",
        {f"{TRAIN}.networkPolicy": {"workerGroups": [{"groupName": "x"}]}},
        f"{TRAIN}.networkPolicy.workerGroups[0].groupName",
    ),
    ("submission-mode", {f"{JOB}.submissionMode": "K8sJob"}, None),
    ("suspend-needs-shutdown", {f"{JOB}.suspend": True, f"{JOB}.shutdownAfterJobFinishes": False}, None),
    ("ttl-needs-shutdown", {f"{JOB}.ttlSecondsAfterFinished": 5, f"{JOB}.shutdownAfterJobFinishes": False}, None),
    ("one-cluster", {f"{JOB}.rayClusterSpec": REMOVED}, None),
    ("one-cluster", {f'{JOB}.clusterSelector["ray.io/cluster"]': "x"}, f"{JOB}.clusterSelector"),
    ("selector-modes", {f"{JOB}.backoffLimit": 1, f'{JOB}.clusterSelector["ray.io/cluster"]': "x"}, None),
    ("interactive-retries", {f"{JOB}.backoffLimit": 1, f"{JOB}.submissionMode": "InteractiveMode"}, None),
    (
        "sidecar-mode",
        {f"{JOB}.submitterPodTemplate.spec.restartPolicy": "Never", f"{JOB}.submissionMode": "SidecarMode"},
        f"{JOB}.submitterPodTemplate",
    ),
    ("deadlines", {f"{JOB}.activeDeadlineSeconds": 0}, None),
    ("backoff-limit", {f"{JOB}.backoffLimit": -1}, None),
    ("entrypoint-shell", {f"{JOB}.entrypoint": f"{TRAIN_COMMAND} {SHARED} && true"}, None),
    ("entrypoint-shell", {f"{JOB}.entrypoint": f'{TRAIN_COMMAND} --set run.name="$HOME"'}, None),
    ("runtime-env-text", {f"{JOB}.runtimeEnvYAML": "{"}, None),
    (
        "deletion-strategy",
        {
            f"{JOB}.deletionStrategy": {
                "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]
            }
        },
        f"{JOB}.deletionStrategy.deletionRules",
    ),
    (
        "deletion-rules-order",
        {
            f"{JOB}.deletionStrategy.deletionRules": [
                {"policy": p, "condition": {"jobStatus": "FAILED", "ttlSeconds": s}}
                for p, s in (("DeleteCluster", 9), ("DeleteSelf", 5))
            ]
        },
        f"{JOB}.deletionStrategy.deletionRules[1].condition.ttlSeconds",
    ),
    ("schedule", {f"{NIGHTLY}.schedule": "61 2 * * *"}, None),
    ("schedule", {f"{NIGHTLY}.timeZone": "Europe/Nowhere"}, None),
    (
        "kueue",
        {'RayJob/train metadata.labels["kueue.x-k8s.io/queue-name"]': "q", f"{JOB}.shutdownAfterJobFinishes": False},
        f"{JOB}.shutdownAfterJobFinishes",
    ),
    ("upgrade-type", {f"{SERVICE}.upgradeStrategy.type": "Rolling"}, None),
    ("incremental-upgrade", {f"{SERVICE}.upgradeStrategy.clusterUpgradeOptions.stepSizePercent": 60}, None),
    ("incremental-upgrade", {f"{SERVE}.enableInTreeAutoscaling": False}, None),
    ("head-service-name", {f"{SERVE}.headGroupSpec.headService.metadata.name": "x"}, None),
    ("deletion-delay", {f"{SERVICE}.rayClusterDeletionDelaySeconds": -1}, None),
    ("initializing-timeout", {'RayService/serve metadata.annotations["ray.io/initializing-timeout"]': "soon"}, None),
    ("same-object-twice", {"ServiceAccount/again": made("v1", "ServiceAccount", "train")}, None),
    ("namespaces-differ", {"PersistentVolumeClaim/shared metadata.namespace": "raymodel"}, None),
    ("reference-missing", {f"{TRAIN_HEAD}.serviceAccountName": "trian"}, None),
    ("reference-missing", {f"{TRAIN_HEAD}.volumes[0].persistentVolumeClaim.claimName": "x"}, None),
    ("reference-missing", {f"{SERVE_POD}.volumes[2].configMap.name": "x"}, None),
    (
        "reference-missing",
        {'Namespace/raymodels metadata.annotations["raymodels/external"]': "Secret/serve-keys GatewayClass/istio"},
        f"{SERVE}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name",
    ),
    ("reference-missing", {'RayJob/train metadata.labels["kueue.x-k8s.io/queue-name"]': "q"}, None),
    (
        "external-unused",
        {'Namespace/raymodels metadata.annotations["raymodels/external"]': f"{EXTERNAL} Secret/x"},
        None,
    ),
    (
        "key-missing",
        {f"{SERVE_POD}.volumes[2].configMap.items": [{"key": "x", "path": "serve.yaml"}]},
        f"{SERVE_POD}.volumes[2].configMap.items[0].key",
    ),
    ("volume-missing", {f"{TRAIN_POD}.containers[0].volumeMounts[0].name": "x"}, None),
    ("volume-unused", {f"{TRAIN_POD}.volumes[2]": {"name": "x", "emptyDir": {}}}, f"{TRAIN_POD}.volumes[2].name"),
    ("mount-path-twice", {f"{TRAIN_POD}.containers[0].volumeMounts[1].mountPath": "/mnt/shared"}, None),
    (
        "selects-nothing",
        {'PodDisruptionBudget/head spec.selector.matchLabels["ray.io/node-type"]': "haed"},
        "PodDisruptionBudget/head spec.selector",
    ),
    ("selects-nothing", {"NetworkPolicy/within spec.podSelector": {"matchLabels": {"ray.io/cluster": "train"}}}, None),
    (
        "selects-nothing",
        {"PodMonitor/ray spec.selector": {"matchLabels": {"ray.io/originated-from-crd": "RayService"}}},
        None,
    ),
    ("service-port", {"Service/web spec.ports[0].targetPort": 8001}, None),
    ("monitored-port", {"PodMonitor/ray spec.podMetricsEndpoints[0].port": "metric"}, None),
    (
        "two-autoscalers",
        {
            "x": made(
                "autoscaling/v2",
                "HorizontalPodAutoscaler",
                "x",
                spec={"scaleTargetRef": {"kind": "RayService", "name": "serve"}},
            )
        },
        "HorizontalPodAutoscaler/x spec.scaleTargetRef.name",
    ),
    (
        "two-autoscalers",
        {
            "x": made(
                "keda.sh/v1alpha1",
                "ScaledObject",
                "x",
                spec={"scaleTargetRef": {"kind": "RayCluster", "name": "serve"}},
            ),
            "y": made("ray.io/v1", "RayCluster", "serve", spec={}),
        },
        "ScaledObject/x spec.scaleTargetRef.name",
    ),
    ("quantity-form", {f"{TRAIN_POD}.containers[0].resources.limits.memory": "8 GB"}, None),
    ("requests-above-limits", {f"{TRAIN_POD}.containers[0].resources.requests.cpu": "4.5"}, None),
    ("accelerators-exact", {f'{TRAIN_POD}.containers[0].resources.requests["nvidia.com/gpu"]': "2"}, None),
    ("gpu-toleration", {f"{TRAIN_POD}.tolerations": []}, None),
    (
        "gpu-toleration",
        {f"{TRAIN_POD}.tolerations[0]": {"key": "nvidia.com/gpu", "value": "present", "effect": "NoExecute"}},
        f"{TRAIN_POD}.tolerations",
    ),
    ("shared-memory-fits", {f"{TRAIN_POD}.volumes[1].emptyDir.sizeLimit": "8Gi"}, None),
    ("store-fits", {f'{TRAIN_WORKERS}.rayStartParams["object-store-memory"]': "9000000000"}, None),
    ("store-fits", {f'{TRAIN_WORKERS}.rayStartParams["object-store-memory"]': "3000000000"}, None),
    ("store-fits", {f'{TRAIN_WORKERS}.rayStartParams["object-store-memory"]': REMOVED}, None),
    ("quota-fits", queued(gpus=1), f"{GPU_QUOTA}.nominalQuota"),
    ("quota-fits", queued(resources=("cpu", "memory")), "ClusterQueue/pool spec.resourceGroups"),
    ("value-unknown", {f"{TRAIN_POD}.tolerations[0].effect": "NoSchedul"}, None),
    ("value-unknown", {f"{JOB}.submitterPodTemplate.spec.restartPolicy": "never"}, None),
    ("public-service", {"Service/web spec.type": "LoadBalancer", "Service/web spec.ports[0].targetPort": 8265}, None),
    ("head-service-type", {f"{SERVE}.headGroupSpec.serviceType": "LoadBalancer"}, None),
    (
        "public-route",
        {
            "x": made(
                "networking.k8s.io/v1",
                "Ingress",
                "x",
                spec={"defaultBackend": {"service": {"name": "h", "port": {"number": 8265}}}},
            )
        },
        "Ingress/x spec.defaultBackend.service.port.number",
    ),
    (
        "budget-form",
        {"PodDisruptionBudget/head spec": {"maxUnavailable": 1, "selector": {}}},
        "PodDisruptionBudget/head spec.maxUnavailable",
    ),
    ("budget-form", {"PodDisruptionBudget/workers spec.minAvailable": "50%"}, None),
    ("budget-of-gang", budgeted(4), "PodDisruptionBudget/gang spec.minAvailable"),
    (
        "open-policy",
        {"NetworkPolicy/within spec.ingress[0]": {"ports": [{"port": 8265}]}},
        "NetworkPolicy/within spec.ingress[0].ports[0].port",
    ),
    ("open-policy", {"NetworkPolicy/within spec.ingress[0]": {"from": [{"ipBlock": {"cidr": "::/0"}}]}}, None),
    ("open-policy", {"NetworkPolicy/within spec.ingress[0]": {"from": [{"namespaceSelector": {}}]}}, None),
    (
        "open-policy",
        {"NetworkPolicy/within spec.ingress[0]": {"ports": [{"port": 8000, "endPort": 9000}]}},
        "NetworkPolicy/within spec.ingress[0].ports[0].endPort",
    ),
    (
        "open-policy",
        {"NetworkPolicy/within spec.ingress[0]": {"ports": [{"port": "serve", "endPort": 9000}]}},
        "NetworkPolicy/within spec.ingress[0].ports[0].endPort",
    ),
    (
        "open-policy",
        {"NetworkPolicy/within spec.ingress[0]": {"ports": [{"protocol": "TCP"}]}},
        "NetworkPolicy/within spec.ingress[0].ports[0]",
    ),
    (
        "network-policy-missing",
        {"NetworkPolicy/within spec.podSelector": {"matchLabels": {"ray.io/node-type": "head"}}},
        SERVE_POD,
    ),
    ("monitor-missing", {"PodMonitor/ray spec.selector": {"matchLabels": {"ray.io/node-type": "worker"}}}, SERVE_HEAD),
    ("alerts-missing", {"PrometheusRule/training spec.groups": []}, "RayJob/train"),
    (
        "alert-remedy",
        {"PrometheusRule/training spec.groups[0].rules[0].annotations.remedy": ""},
        "PrometheusRule/training spec.groups[0].rules[0].annotations",
    ),
    ("image-form", {f"{TRAIN_HEAD}.containers[0].image": "raymodels:latest"}, None),
    ("ray-version", {f"{TRAIN}.rayVersion": "2.59.0"}, None),
    ("ray-version", {f"{TRAIN_HEAD}.containers[0].image": "raymodels:0.1.0-ray2.59.0-cpu"}, None),
    ("image-flavour", {f"{TRAIN_POD}.containers[0].image": IMAGE % "cpu"}, None),
    ("entrypoint-form", {f"{JOB}.entrypoint": f"{TRAIN_COMMAND} --sett run.name=x"}, None),
    ("entrypoint-script", {f"{JOB}.entrypoint": "python /app/jobs/trane.py /app/jobs/configs/demo.yaml"}, None),
    ("entrypoint-config", {f"{JOB}.entrypoint": f"{TRAIN_COMMAND} {SHARED} --set train.step=4"}, None),
    ("entrypoint-config", {f"{JOB}.entrypoint": "python /app/jobs/train.py /app/jobs/configs/dmeo.yaml"}, None),
    ("storage-shared", {f"{JOB}.entrypoint": TRAIN_COMMAND}, None),
    (
        "storage-shared",
        {f"{TRAIN_POD}.volumes[0]": {"name": "shared", "emptyDir": {}}},
        f"{TRAIN_POD}.volumes[0].emptyDir",
    ),
    (
        "storage-shared",
        {f"{TRAIN_POD}.containers[0].volumeMounts[0].mountPath": "/mnt/other"},
        f"{TRAIN_POD}.containers[0].volumeMounts",
    ),
    ("claim-shared", {"PersistentVolumeClaim/shared spec.accessModes": ["ReadWriteOnce"]}, None),
    ("workers-fit", {f"{TRAIN_WORKERS}.replicas": 1}, None),
    ("workers-fit", {f"{TRAIN_WORKERS}.replicas": 3}, None),
    ("serve-config-text", {f"{SERVED}": "applications: ["}, None),
    ("serve-config-keys", {f"{SERVED}.http_option": {}}, None),
    (
        "serve-config-keys",
        {f"{SERVED}.applications[0].deployments": [{"name": "d", "num_replica": 2}]},
        f"{SERVED}.applications[0].deployments[0].num_replica",
    ),
    (
        "serve-config-values",
        {
            f"{SERVED}.applications[0].deployments": [
                {"name": "d", "autoscaling_config": {"min_replicas": 3, "max_replicas": 1}}
            ]
        },
        f"{SERVED}.applications[0].deployments[0].autoscaling_config",
    ),
    ("runtime-env-keys", {f"{JOB}.runtimeEnvYAML": "env_var: {}"}, f"{JOB}.runtimeEnvYAML.env_var"),
    ("serve-config-values", {f"{SERVED}.applications[0].deployments": ["d"]}, SERVED),
    ("proxy-location", {f"{SERVED}.proxy_location": "HeadOnly"}, None),
    ("serve-port", {f"{SERVED}.http_options.port": 8001}, None),
    ("serve-import", {f"{SERVED}.applications[0].import_path": "raymodels.serve.deploy:aplication"}, None),
    ("application-config", {f"{SERVED}.applications[0].args.config": "/etc/raymodels/x.yaml"}, None),
    ("application-config", {f"{CONFIG}.modelz": []}, CONFIG),
    (
        "serve-table",
        {f"{SERVED}.applications[0].deployments": [{"name": "gateway", "user_config": {"tabel": {}}}]},
        f"{SERVED}.applications[0].deployments[0].user_config",
    ),
    (
        "serve-table",
        {
            f"{SERVED}.applications[0].deployments": [
                {"name": "gateway", "user_config": {"table": {"m": {"applications": {"demo--v2": 1}}}}}
            ]
        },
        f"{SERVED}.applications[0].deployments[0].user_config.table.m",
    ),
    (
        "application-config",
        {f"{SERVED}.applications[1]": {**NEXT, "args": {"config": "/etc/raymodels/serve.yaml", "model": "other"}}},
        f"{SERVED}.applications[1].args.model",
    ),
    ("application-config", {f"{SERVED}.applications[1]": NEXT}, f"{SERVED}.applications[1].args.config"),
    ("registry-shared", {f"{CONFIG}.registry": "/mnt/shared/other"}, None),
    ("model-published", {f"{CONFIG}.models[0].model": "other@prod"}, None),
    ("model-published", {f"{CONFIG}.models[0].model": "python-demo@canary"}, None),
    ("replicas-fit", {f"{CONFIG}.models[0].cpus": 8}, None),
    ("replicas-fit", {f"{SERVE_WORKERS}.maxReplicas": 1}, None),
    ("drains", {f"{SERVICE}.rayClusterDeletionDelaySeconds": 60}, None),
    ("mounted-files", {f"{CONFIG}.http.keys_file": "/etc/other/keys.yaml"}, None),
    ("endpoint-open", {f"{CONFIG}.http": REMOVED}, f"{CONFIG}.http.keys_file"),
    ("fixed-gang", {f"{TRAIN_WORKERS}.maxReplicas": 4}, None),
    (
        "head-without-work",
        {f'{SERVE}.headGroupSpec.rayStartParams["num-cpus"]': REMOVED},
        f"{SERVE}.headGroupSpec.rayStartParams.num-cpus",
    ),
    (
        "shared-memory-missing",
        {f"{SERVE_POD}.containers[0].volumeMounts[1].mountPath": "/tmp/shm"},
        f"{SERVE_POD}.containers[0].volumeMounts",
    ),
    ("job-deadlines", {f"{JOB}.preRunningDeadlineSeconds": REMOVED}, None),
    ("job-is-retried", {f"{JOB}.backoffLimit": 0}, None),
    ("job-cleans-up", {f"{JOB}.shutdownAfterJobFinishes": False}, None),
    ("service-autoscales", {f"{SERVE}.autoscalerOptions.version": "v1"}, None),
    ("service-survives-its-head", {f"{SERVE}.gcsFaultToleranceOptions.redisAddress": REMOVED}, None),
    ("head-is-not-served", {f"{SERVICE}.excludeHeadPodFromServeSvc": REMOVED}, None),
    (
        "disruption-budget-missing",
        {"PodDisruptionBudget/head spec.selector": {"matchLabels": {"ray.io/node-type": "worker"}}},
        SERVE_HEAD,
    ),
    (
        "spread-selects-itself",
        {f"{SERVE_POD}.topologySpreadConstraints[0].labelSelector": {"matchLabels": {"ray.io/group": "replica"}}},
        None,
    ),
    ("topology-spread", {f"{SERVE_POD}.topologySpreadConstraints": REMOVED}, None),
    ("pod-security", {f"{TRAIN_POD}.securityContext.runAsNonRoot": False}, None),
    (
        "pod-security",
        {f"{TRAIN_POD}.securityContext.seccompProfile": REMOVED},
        f"{TRAIN_POD}.securityContext.seccompProfile.type",
    ),
    ("root-user", {f"{TRAIN_POD}.securityContext.runAsUser": 0}, None),
    ("container-security", {f"{TRAIN_POD}.containers[0].securityContext.capabilities.drop": ["NET_RAW"]}, None),
    ("container-security", {f"{SERVE}.autoscalerOptions.securityContext.allowPrivilegeEscalation": REMOVED}, None),
    ("amounts-missing", {f"{TRAIN_POD}.containers[0].resources.limits.memory": REMOVED}, None),
    ("own-account", {f"{TRAIN_POD}.serviceAccountName": REMOVED}, None),
    ("own-account", {f"{SERVE_POD}.serviceAccountName": "train"}, None),
    ("account-token", {f"{TRAIN_POD}.automountServiceAccountToken": REMOVED}, None),
    ("account-token", {f"{SERVE_HEAD}.automountServiceAccountToken": False}, None),
    ("image-digest", {f"{TRAIN_HEAD}.containers[0].image": IMAGE[: IMAGE.index("@")] % "cpu"}, None),
    ("ray-token", {f"{TRAIN}.authOptions.mode": "disabled"}, None),
    (
        "ray-token",
        {f"{SERVE_POD}.containers[0].env[0]": {"name": "RAY_AUTH_MODE", "value": "disabled"}},
        f"{SERVE_POD}.containers[0].env[0].value",
    ),
    ("container-security", {f"{TRAIN_POD}.containers[0].securityContext.runAsNonRoot": False}, None),
    ("container-security", {f"{TRAIN_POD}.containers[0].securityContext.seccompProfile.type": "Unconfined"}, None),
    ("container-security", {f"{SERVE_POD}.containers[0].ports[0].hostPort": 8000}, None),
    (
        "secret-shown",
        {f"{TRAIN_HEAD}.containers[0].env[0]": {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}},
        f"{TRAIN_HEAD}.containers[0].env[0].value",
    ),
    ("secret-shown", {"x": made("v1", "Secret", "redis", stringData={"password": "x"})}, "Secret/redis stringData"),
    ("submitter-unconfined", {f"{NIGHTLY}.jobTemplate.submitterPodTemplate": REMOVED}, None),
    ("fabric-settings", {f"{TRAIN_POD}.containers[0].env": REMOVED}, None),
    (
        "fabric-settings",
        {f'{TRAIN_POD}.containers[0].resources.limits["vpc.amazonaws.com/efa"]': "4"},
        f"{TRAIN_POD}.containers[0].env",
    ),
    (
        "fabric-settings",
        {
            f'{TRAIN_POD}.containers[0].resources.limits["rdma/shared"]': "1",
            f"{TRAIN_POD}.containers[0].env[1]": {"name": "NCCL_IB_HCA", "value": "mlx5"},
        },
        f"{TRAIN_POD}.containers[0].env",
    ),
    (
        "fabric-settings",
        {
            f'{TRAIN_POD}.containers[0].resources.limits["rdma/shared"]': "1",
            f"{TRAIN_POD}.containers[0].env[1]": {"name": "NCCL_NET", "value": "Socket"},
        },
        f"{TRAIN_POD}.containers[0].env[1].value",
    ),
]

# Those that a schema finds.
SCHEMA_CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("unknown-field", {f"{TRAIN}.headGroupSpecs": {}}, None),
    ("unknown-field", {f"{SERVE_POD}.containers[0].resourcez": {}}, None),
    ("unknown-field", {"PersistentVolumeClaim/shared spec.accessMode": []}, None),
    ("unknown-field", {"PodMonitor/ray spec.podMetricsEndpoints[0].prot": "x"}, None),
    ("missing-field", {f"{TRAIN_WORKERS}.groupName": REMOVED}, None),
    ("schema", {f"{TRAIN_WORKERS}.replicas": "two"}, None),
    ("schema", {f"{SERVE}.autoscalerOptions.version": "v3"}, None),
    ("schema", {f"{TRAIN_POD}.containers[1]": container("ray-worker")}, None),
    ("schema", {"PodDisruptionBudget/head spec.minAvailable": [1]}, None),
    ("schema", {f"{SERVE_WORKERS}.numOfHosts": 3_000_000_000}, None),
    ("cel", {f"{JOB}.managedBy": "me"}, None),
    ("unknown-kind", {"x": made("ray.io/v1", "RayJobb", "x")}, "RayJobb/x kind"),
]
