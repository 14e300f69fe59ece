"""A small set of manifests in which the check finds nothing, for tests that put one mistake into it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

import raymodels
from raymodels.k8s.manifests import Document, ManifestSet
from raymodels.k8s.project import pinned_ray

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared/kuberay"
REMOVED = object()
KEY = re.compile(r'\["([^"]+)"\]|\[(\d+)\]|([^.\[\]]+)')
Json = dict[str, Any]

IMAGE = f"raymodels:{raymodels.__version__}-ray{pinned_ray()}-%s@sha256:{'0' * 64}"
EXTERNAL = "Secret/redis Secret/serve-keys GatewayClass/istio"
STORE = {"object-store-memory": str(2**30)}
CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def container(name: str, cpu: str = "4", memory: str = "8Gi", image: str = IMAGE % "cpu", **more: Any) -> Json:
    amounts = {"cpu": cpu, "memory": memory}
    resources = {"requests": dict(amounts), "limits": dict(amounts)}
    return {"name": name, "image": image, "securityContext": dict(CONFINED), "resources": resources, **more}


def pod(account: str, *containers: Json, token: bool = False, **more: Any) -> Json:
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    fixed = {"serviceAccountName": account, "automountServiceAccountToken": token, "securityContext": security}
    return {"spec": {**fixed, "containers": list(containers), **more}}


def ray_pod(account: str, name: str, gpus: int = 0, token: bool = False, **more: Any) -> Json:
    mounts = [{"name": "shared", "mountPath": "/mnt/shared"}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[Json] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    if account == "serve":
        mounts += [{"name": "config", "mountPath": "/etc/raymodels"}, {"name": "keys", "mountPath": "/etc/keys"}]
        volumes.append({"name": "config", "configMap": {"name": "serve-config"}})
        volumes.append({"name": "keys", "secret": {"secretName": "serve-keys"}})
    one = container(name, volumeMounts=mounts, ports=[{"name": "serve", "containerPort": 8000}])
    if gpus:
        one["env"] = [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}]
        one["image"] = IMAGE % "cuda"
        for amounts in one["resources"].values():
            amounts["nvidia.com/gpu"] = str(gpus)
        more["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod(account, one, token=token, volumes=volumes, **more)


def train_job() -> Json:
    sets = [f"--set {key}=/mnt/shared/{name}" for key, name in (("run.storage", "runs"), ("data.prepared", "prepared"))]
    entrypoint = ["python /app/jobs/train.py /app/jobs/configs/demo.yaml", *sets, "--set registry=/mnt/shared/registry"]
    worker = {"groupName": "workers", "replicas": 2, "minReplicas": 2, "maxReplicas": 2, "rayStartParams": dict(STORE)}
    return {
        "entrypoint": " ".join([*entrypoint, "--set workers.gpus=1"]),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 2,
        "activeDeadlineSeconds": 86400,
        "preRunningDeadlineSeconds": 900,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "submitterPodTemplate": pod("train", container("ray-job-submitter", "1", "1Gi"), restartPolicy="Never"),
        "rayClusterSpec": {
            "rayVersion": pinned_ray(),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **STORE}, "template": ray_pod("train", "ray-head")},
            "workerGroupSpecs": [{**worker, "template": ray_pod("train", "ray-worker", gpus=1)}],
        },
    }


def service() -> Json:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"ray.io/group": "replicas"}},
    }
    application = {
        "name": "raymodels",
        "import_path": "raymodels.serve.deploy:application",
        "route_prefix": "/",
        "args": {"config": "/etc/raymodels/serve.yaml"},
    }
    serve = {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": 8000}}
    redis = {"secretKeyRef": {"name": "redis", "key": "password"}}
    worker = {"groupName": "replicas", "replicas": 1, "minReplicas": 1, "maxReplicas": 4, "rayStartParams": dict(STORE)}
    head = ray_pod("serve", "ray-head", token=True, restartPolicy="Never")
    amounts = {"cpu": "500m", "memory": "512Mi"}
    return {
        "rayClusterDeletionDelaySeconds": 660,
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "gatewayClassName": "istio",
                "maxSurgePercent": 50,
                "stepSizePercent": 10,
                "intervalSeconds": 30,
            },
        },
        "serveConfigV2": yaml.safe_dump({**serve, "applications": [application]}, sort_keys=False),
        "rayClusterConfig": {
            "rayVersion": pinned_ray(),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "idleTimeoutSeconds": 300,
                "securityContext": dict(CONFINED),
                "resources": {"requests": dict(amounts), "limits": dict(amounts)},
            },
            "gcsFaultToleranceOptions": {"redisAddress": "redis:6379", "redisPassword": {"valueFrom": redis}},
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **STORE}, "template": head},
            "workerGroupSpecs": [
                {
                    **worker,
                    "template": ray_pod(
                        "serve", "ray-worker", restartPolicy="Never", topologySpreadConstraints=[spread]
                    ),
                }
            ],
        },
    }


def evaluation() -> Json:
    job = copy.deepcopy(train_job())
    job["entrypoint"] = job["entrypoint"].replace("jobs/train.py", "jobs/evaluate.py")
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    for template in [job["submitterPodTemplate"], *(group["template"] for group in groups)]:
        template["spec"]["serviceAccountName"] = "evaluate"
    return {"schedule": "30 2 * * 1-5", "timeZone": "Europe/Berlin", "jobTemplate": job}


def budget(node_type: str) -> Json:
    selector = {"matchLabels": {"ray.io/node-type": node_type}}
    return {"spec": {"minAvailable": 1, "selector": selector}}


def alert() -> Json:
    told = {"summary": "No training step for a while", "remedy": "Read the log's last lines"}
    rule = {"alert": "TrainingStalls", "expr": "rate(raymodels_train_steps_total[15m]) == 0", "annotations": told}
    return {"spec": {"groups": [{"name": "training", "rules": [rule]}]}}


def serve_config() -> str:
    model = {"model": "python-demo@prod", "cpus": 2, "autoscaling": {"max_replicas": 4}}
    told = {"registry": "/mnt/shared/registry", "models": [model], "http": {"keys_file": "/etc/keys/keys.yaml"}}
    return yaml.safe_dump(told, sort_keys=False)


def good() -> list[Json]:
    """The objects of the set, new ones every time."""
    notes = {"raymodels/profile": "production", "raymodels/external": EXTERNAL, "raymodels/feature-gates": "RayCronJob"}
    ray_pods = {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    within = {"podSelector": ray_pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": ray_pods}]}]}
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}
    web = {"selector": {"ray.io/serve": "true"}, "ports": [{"port": 80, "targetPort": 8000}]}
    return [
        made("v1", "Namespace", "raymodels", metadata={"annotations": notes}),
        *(made("v1", "ServiceAccount", name) for name in ("train", "serve", "evaluate")),
        made("v1", "PersistentVolumeClaim", "shared", spec=claim),
        made("v1", "ConfigMap", "serve-config", data={"serve.yaml": serve_config()}),
        made("v1", "Service", "web", spec=web),
        made("ray.io/v1", "RayJob", "train", spec=train_job()),
        made("ray.io/v1", "RayService", "serve", spec=service()),
        made("ray.io/v1", "RayCronJob", "evaluate", spec=evaluation()),
        made("policy/v1", "PodDisruptionBudget", "head", **budget("head")),
        made("policy/v1", "PodDisruptionBudget", "workers", **budget("worker")),
        made("networking.k8s.io/v1", "NetworkPolicy", "within", spec=within),
        made(
            "monitoring.coreos.com/v1",
            "PodMonitor",
            "ray",
            spec={"selector": ray_pods, "podMetricsEndpoints": [{"port": "metrics"}]},
        ),
        made("monitoring.coreos.com/v1", "PrometheusRule", "training", **alert()),
    ]


def made(version: str, kind: str, name: str, metadata: Json | None = None, **more: Any) -> Json:
    space = {} if kind == "Namespace" else {"namespace": "raymodels"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **space, **(metadata or {})}, **more}


def edited(changes: dict[str, Any]) -> list[Json]:
    """The good set with values set, or removed, at places such as ``RayJob/train spec.backoffLimit``."""
    objects = copy.deepcopy(good())
    for place, value in changes.items():
        name, _, path = place.partition(" ")
        if not path:
            objects.append(value)
            continue
        [target] = [one for one in objects if f"{one['kind']}/{one['metadata']['name']}" == name]
        put(target, [int(index) if index else quoted or plain for quoted, index, plain in KEY.findall(path)], value)
    return objects


def put(target: Any, keys: list[Any], value: Any) -> None:
    *parents, last = keys
    for depth, key in enumerate(parents):
        below = target.setdefault(key, {}) if isinstance(target, dict) else target[key]
        if isinstance(below, str):  # YAML within text
            told = yaml.safe_load(below)
            put(told, keys[depth + 1 :], value)
            target[key] = yaml.safe_dump(told, sort_keys=False)
            return
        target = below
    if value is REMOVED:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value


def as_set(objects: list[Json], app: Path | None = ROOT) -> ManifestSet:
    return ManifestSet("test", [Document(one, Path("set.yaml")) for one in objects], None, app)
