"""Pods of rendered manifests, on hosts of this machine: the commands that KubeRay's operator writes, run as it would.

A container has a root folder of its own, which is the machine's with the image's /app and the pod's volumes at their
paths; the environment variables of its manifest and of the operator; the machine's Python. Not its user, whom a
machine need not let into the folders of its Python, and no limits of CPU and memory. The autoscaler, which talks to
Kubernetes, is left out. Needs what `tests.soak.hosts` needs.

Source of the commands: ray-operator/controllers/ray/common/pod.go and job.go of KubeRay 1.7.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.build_root import DOCKERFILE, STAND_INS, Builder, Image
from cluster.dockerfile import order, parse
from raymodels.k8s import files
from raymodels.k8s.quantities import amount
from tests.soak.hosts import Host

GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = 6379, 8265, 52365, 8080
BASH = ["/bin/bash", "-c", "--"]
STRICT_BASH = ["/bin/bash", "-ce", "--"]
# The machine's root, to which nothing is written: folders that a volume's path lacks are made on a layer above it.
ROOT = """
mount -t tmpfs tmpfs {root}
for entry in $(ls -A /); do
    if [ -L /$entry ]; then cp -P /$entry {root}/
    elif [ -d /$entry ]; then mkdir {root}/$entry; mount --rbind /$entry {root}/$entry
    fi
done
place() {{
    if [ ! -d {root}$2 ] && [ -d /$1 ] && [ ! -d {root}/.layers/$1 ]; then
        mkdir -p {root}/.layers/$1/upper {root}/.layers/$1/work
        layers=lowerdir=/$1,upperdir={root}/.layers/$1/upper,workdir={root}/.layers/$1/work
        mount -t overlay overlay -o $layers {root}/$1
        if [ $1 = etc ]; then mount --bind /etc/hosts {root}/etc/hosts; fi
    fi
    mkdir -p {root}$2
}}
"""
ASK = """
import json, sys, urllib.error, urllib.request
asked = json.load(sys.stdin)
asked["data"] = asked["data"] and asked["data"].encode()
try:
    answer = urllib.request.urlopen(urllib.request.Request(**asked), timeout=60)
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    sys.exit(str(error))
print(json.dumps([answer.status, answer.read().decode()]))
"""


def image_folder(folder: Path) -> Path:
    """The /app of the image, by the Dockerfile's own steps."""
    builder, image = Builder(folder, {}, []), Image(str(folder / "image"))
    for step in order(parse(DOCKERFILE.read_text(), STAND_INS), "cpu")[-1].steps:
        if step.name == "WORKDIR" or (step.name == "COPY" and not step.copied_stage):
            builder.step(step, image, {}, {})
    return Path(image.root + image.workdir)


def missing() -> str:
    """Why there can be no such pods on a host; empty if there can."""
    if shutil.which("wget") is None:
        return "wget is not installed"
    probe = 'mount -t tmpfs tmpfs "$0"; mkdir "$0"/{upper,work,mnt}; mount -t overlay overlay -o "$1" "$0/mnt"'
    with tempfile.TemporaryDirectory() as folder:
        layers = f"lowerdir=/etc,upperdir={folder}/upper,workdir={folder}/work"
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-ec", probe, folder, layers], capture_output=True, text=True
        )
    return f"no overlay can be mounted over /etc: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True)
class Kubernetes:
    """What pods are given: the set's ConfigMaps, Secrets, the image's /app, Ray's token.

    ``folder`` has the volumes and the logs.
    """

    objects: list[dict[str, Any]]
    secrets: dict[str, dict[str, str]]
    app: Path
    folder: Path
    token: str

    @property
    def shared(self) -> Path:
        """The volume of the claim that the set makes."""
        return self.folder / "persistentVolumeClaim/shared"

    def start(
        self, host: Host, pod: dict[str, Any], command: list[str], env: Mapping[str, str], name: str = ""
    ) -> subprocess.Popen[bytes]:
        """Run a command in a pod's first container, or in one like it with another name; its log is in the folder."""
        container = pod["containers"][0]
        name = f"{host.name}-{name or container['name']}"
        ours = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "/app"}
        ours |= {entry["name"]: entry["value"] for entry in container.get("env", [])} | dict(env)
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "HOME": str(Path.home())}
        foreign = [word for variable in os.environ if variable not in ours for word in ("-u", variable)]
        root = Path(tempfile.mkdtemp(dir=self.folder, prefix=name))
        script = "\n".join([ROOT.format(root=root), *self._mounts(pod, root), f'exec chroot {root} "$@"'])
        entered = ["unshare", "--mount", "bash", "-ec", script, "bash", "env", *foreign, "--chdir=/app", *command]
        return host.start(entered, self.folder / f"{name}.log", ours)

    def _mounts(self, pod: dict[str, Any], root: Path) -> Iterator[str]:
        yield f"place app /app; mount --bind {self.app} {root}/app"
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for mount in pod["containers"][0].get("volumeMounts", []):
            path, volume = posixpath.normpath(mount["mountPath"]), volumes[mount["name"]]
            yield f"place {PurePosixPath(path).parts[1]} {path}"
            if "emptyDir" in volume:
                yield f"mount -t tmpfs -o size={amount(volume['emptyDir']['sizeLimit']):f} tmpfs {root}{path}"
            else:
                yield f"mount --bind {self._volume(volume)} {root}{path}"
                if mount.get("readOnly"):
                    yield f"mount -o remount,bind,ro {root}{path}"

    def _volume(self, volume: dict[str, Any]) -> Path:
        """The folder that a claim, ConfigMap or Secret is."""
        [(kind, told)] = [(key, value) for key, value in volume.items() if key != "name"]
        name = told.get("claimName") or told.get("secretName") or told["name"]
        place = self.folder / kind / name
        place.mkdir(parents=True, exist_ok=True)
        for file, text in self._content(kind, name).items():
            (place / file).write_text(text)
        return place

    def _content(self, kind: str, name: str) -> dict[str, str]:
        if kind == "secret":
            return self.secrets[name]
        maps = (one for one in self.objects if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", name))
        return next(maps)["data"] if kind == "configMap" else {}

    def ask(
        self,
        host: Host,
        url: str,
        token: str | None = None,
        body: Any = None,
        method: str = "GET",
        header: str = "x-ray-authorization",
    ) -> tuple[int, str]:
        """Status and text of what answers a request from a host; by default with the header that the operator sends.

        Raises:
            ConnectionError: nothing answers.
        """
        headers = {"Content-Type": "application/json", **({header: f"Bearer {token}"} if token else {})}
        asked = {"url": url, "data": json.dumps(body) if body else None, "headers": headers, "method": method}
        command = host.entered([sys.executable, "-c", ASK])
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise ConnectionError(done.stderr.strip())
        status, text = json.loads(done.stdout)
        return status, text


def ray_start(group: dict[str, Any], head: str) -> str:
    """The command line of a Ray container; ``head`` is the address of the head that a worker joins."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    joins = {"address": f"{head}:{GCS_PORT}"} if "groupName" in group else {"dashboard-host": "0.0.0.0"}
    told = {
        **joins,
        "metrics-export-port": str(METRICS_PORT),
        "block": "true",
        "dashboard-agent-listen-port": str(AGENT_PORT),
        "num-cpus": str(math.ceil(amount(limits["cpu"]) or 0)),
        "memory": str(math.ceil(amount(limits["memory"]) or 0)),
        **group["rayStartParams"],
    }
    flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(told.items())]
    start = "ray start" if "groupName" in group else "ray start --head"
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start} {' '.join(flags)}"


def ray_env(kind: str, group: dict[str, Any], head: str, start: str) -> dict[str, str]:
    """The environment variables that the operator adds to a Ray container's."""
    is_head = "groupName" not in group
    env = {
        "RAY_CLUSTER_NAME": "cluster",
        "RAY_CLUSTER_NAMESPACE": "raymodels",
        "RAY_CLOUD_INSTANCE_ID": "pod",
        "RAY_NODE_TYPE_NAME": group.get("groupName", "headgroup"),
        "KUBERAY_GEN_RAY_START_CMD": start.partition("; ")[2],
        "RAY_PORT": str(GCS_PORT),
        "RAY_ADDRESS": f"{'127.0.0.1' if is_head else head}:{GCS_PORT}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    env |= {} if is_head else {"FQ_RAY_IP": head, "RAY_IP": head}
    if kind == "RayService":
        env |= {"RAY_timeout_ms_task_wait_for_death_info": "0", "RAY_gcs_server_request_timeout_seconds": "5"}
        env |= {"RAY_SERVE_KV_TIMEOUT_S": "5"}
    return env


def submission(job: dict[str, Any], address: str, submission_id: str) -> str:
    """The submitter's script, in which the entrypoint stands as it is in the manifest."""
    health = f"{address}/api/gcs_healthz"
    ready = f"import urllib.request; r=urllib.request.urlopen('{health}', timeout=10); "
    ready += "exit(0 if b'success' in r.read() else 1)"
    waiting = json.dumps(f"Waiting for Ray Dashboard GCS to become healthy at {address} ...")
    submit = ["ray job submit --address", address, "--no-wait"]
    if env := files.parse(job.get("runtimeEnvYAML") or "{}"):
        submit += ["--runtime-env-json", json.dumps(json.dumps(env))]
    submit += ["--submission-id", submission_id, "--", job["entrypoint"].strip(), ";"]
    return " ".join(
        [
            f'until python -c "{ready}" >/dev/null 2>&1 ; do echo {waiting} ; sleep 2 ; done ;',
            f"if ! ray job status --address {address} {submission_id} >/dev/null 2>&1 ; then",
            *submit,
            f"fi ; ray job logs --address {address} --follow {submission_id}",
        ]
    )


def serve_probe(group: dict[str, Any]) -> str:
    """The readiness probe of a RayService's worker, run by bash in its container."""
    ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
    wget = "wget --tries 1 -T {} -q -O- http://localhost:{}/{} | grep success"
    return " && ".join(
        [wget.format(2, AGENT_PORT, "api/local_raylet_healthz"), wget.format(10, ports["serve"], "-/healthz")]
    )
