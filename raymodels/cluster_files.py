"""What is wrong with a file of Ray's cluster launcher, `ray up FILE`, found without a cluster or a cloud account.

Ray's own check comes first. Then what it does not see: keys of the provider that nothing reads, a dashboard for
everyone, a missing token, /dev/shm too small for the object store, an image of another Ray, storage that other nodes do
not see, GPUs that Ray is not told of. All of it is read from the file as Ray fills it in: its defaults for AWS and GCP
listen on every address and install a nightly build.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymodels.errors import ClusterError, ConfigError

Keys = tuple[str | int, ...]
# Ray takes any key in `provider`; these are the ones that it reads.
ANY_PROVIDER = {"type", "use_internal_ips", "disable_node_updaters", "disable_launch_config_check"}
ANY_PROVIDER |= {"foreground_node_launch", "worker_liveness_check"}
PROVIDER_KEYS = {
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {"region", "availability_zone", "cache_stopped_nodes", "key_pair", "security_group", "aws_credentials"}
    | {"cloudwatch", "use_external_head_ip"},
    "gcp": {"region", "availability_zone", "cache_stopped_nodes", "project_id", "gcp_credentials"},
}
BUCKETS = ("s3://", "gs://")
EVERYONE = {"0.0.0.0/0", "::/0"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
SSH = 22
AWS_GPUS = re.compile(r"(p\d|g\d)[a-z0-9-]*\.")
GCP_GPUS = re.compile(r"(a2|a3|a4|g2)-")


@dataclass(frozen=True)
class Finding:
    """Something wrong: where (1 is the first line), which rule, and the remedy."""

    file: Path
    line: int
    path: str
    rule: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}: {self.rule}: {self.problem}; {self.remedy}"


Fault = tuple[Keys, str, str, str]
"""Where, which rule, the problem, the remedy."""


def check(file: Path) -> list[Finding]:
    """Everything that is wrong with a launcher's file.

    Raises:
        ConfigError: it is no file, or no YAML mapping.
        ClusterError: Ray is not installed.
    """
    text, raw = _read(file)
    cluster, refusals = _as_ray_fills_it(raw)
    faults = refusals or [fault for rule in RULES for fault in rule(cluster)]
    root = yaml.compose(text)
    assert root is not None
    return [
        Finding(file, _line(root, keys), ".".join(map(str, keys)) or "file", rule, problem, remedy)
        for keys, rule, problem, remedy in faults
    ]


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text()
        raw = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("provider"), dict):
        raise ConfigError(f"{file} is no cluster launcher's file: give cluster_name, provider and the rest")
    return text, raw


def _as_ray_fills_it(raw: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The file with Ray's defaults, and what Ray has against it. There is no public way to ask."""
    try:
        from ray.autoscaler._private import util
    except ImportError as error:
        raise ClusterError(f"checking a launcher's file needs Ray: pip install 'raymodels[train]' ({error})") from error
    try:
        with contextlib.suppress(RuntimeError):  # that it is not filled in yet
            util.validate_config({key: value for key, value in raw.items() if key != "cluster_synced_files"})
        filled = util.prepare_config(copy.deepcopy(raw))
        util.validate_config(filled)
    except Exception as error:  # one of jsonschema's, or whatever happens to break
        keys = tuple(getattr(error, "absolute_path", ()))
        problem = getattr(error, "message", f"{type(error).__name__}: {error}")
        unknown = re.search(r"'([^']+)' w(?:as|ere) unexpected", problem)
        return raw, [((*keys, unknown[1]) if unknown else keys, "ray", problem, "Ray refuses the file as it is")]
    return filled, []


def provider_keys(cluster: dict[str, Any]) -> Iterator[Fault]:
    kind = cluster["provider"]["type"]
    known = ANY_PROVIDER | PROVIDER_KEYS.get(kind, set())
    if kind in PROVIDER_KEYS:
        for key in cluster["provider"].keys() - known:
            yield ("provider", key), "provider-key", f"nothing in Ray reads it for {kind}", "remove or correct it"


def dashboard(cluster: dict[str, Any]) -> Iterator[Fault]:
    keys = "head_start_ray_commands"
    starts = [(n, line) for n, line in enumerate(cluster[keys]) if "ray start" in line]
    for n, line in starts:
        host = re.search(r"--dashboard-host[= ]'?\"?([^\s'\"]+)", line)
        if host and host[1] not in LOOPBACK:
            yield (
                (keys, n),
                "public-dashboard",
                f"the dashboard and the jobs API listen on {host[1]}",
                "give --dashboard-host=127.0.0.1; `ray dashboard` forwards it by ssh",
            )
    rules = cluster["provider"].get("security_group", {}).get("IpPermissions", [])
    for n, rule in enumerate(rules):
        ranges = {r.get("CidrIp", r.get("CidrIpv6")) for r in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]}
        if ranges & EVERYONE and (rule.get("FromPort"), rule.get("ToPort")) != (SSH, SSH):
            yield (
                ("provider", "security_group", "IpPermissions", n),
                "open-ingress",
                f"everyone may reach ports {rule.get('FromPort')} to {rule.get('ToPort')}",
                "open nothing but ssh",
            )


def token(cluster: dict[str, Any]) -> Iterator[Fault]:
    for node in ("head", "worker"):
        keys, options = _run_options(cluster, node)
        environment = _environment(options)
        for key, text in _strings(cluster):
            if node == "head" and re.search(r"\bRAY_AUTH_TOKEN=\S", text):
                yield key, "token-shown", "the token itself stands here, and in process lists", "copy its file instead"
        if environment.get("RAY_AUTH_MODE") != "token":
            yield (
                keys,
                "no-token",
                f"whoever reaches a {node} node may run code there",
                "add --env=RAY_AUTH_MODE=token",
            )
        elif environment.get("RAY_AUTH_TOKEN_PATH") not in cluster["file_mounts"]:
            yield (
                ("file_mounts",),
                "no-token",
                f"the {node} node has no token at RAY_AUTH_TOKEN_PATH ({environment.get('RAY_AUTH_TOKEN_PATH')})",
                "copy it there: file_mounts: {PATH: ~/.ray/auth_token}",
            )


def containers(cluster: dict[str, Any]) -> Iterator[Fault]:
    if not cluster["docker"].get("container_name"):
        yield (
            ("docker",),
            "no-docker",
            "the nodes run whatever their machines have",
            "give docker.image, container_name",
        )
        return
    for node in ("head", "worker"):
        keys, options = _run_options(cluster, node)
        if not any(option.startswith("--shm-size") for option in options):
            yield keys, "no-shm", f"/dev/shm of a {node} has docker's 64 MB", "add --shm-size=, 30 % of its memory"
        for limit in ("memlock", "nofile"):
            if not any(re.match(rf"--ulimit[= ]{limit}=", option) for option in options):
                yield keys, "no-ulimit", f"no --ulimit={limit} on a {node}", "NCCL pins memory, Ray opens many files"


def versions(cluster: dict[str, Any]) -> Iterator[Fault]:
    ours = importlib.metadata.version("ray")
    for key in ("image", "head_image", "worker_image"):
        image = cluster["docker"].get(key)
        found = image and re.search(r":(?:.*ray)?(\d+\.\d+\.\d+)\b(?!.*ray\d)", image)
        if image and (not found or found[1] != ours):
            has = f"Ray {found[1]}" if found else "no Ray version in its tag"
            yield ("docker", key), "image-version", f"{image} has {has}", f"use an image of Ray {ours}, as is here"
    for key in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        for n, line in enumerate(cluster[key]):
            if re.search(r"pip3? install.*\bray\b", line) and f"ray=={ours}" not in line.replace("[default]", ""):
                place: Keys = (key, n)
                yield place, "image-version", f"installs another Ray: {line[:60]}", f"set {key}, which has a default"


def storage(cluster: dict[str, Any]) -> Iterator[Fault]:
    place: Keys = ("metadata", "shared_storage")
    shared = cluster.get("metadata", {}).get("shared_storage")
    if not shared:
        yield place, "storage", "not said where runs and models lie", "give a mount's path, or a bucket s3:// or gs://"
    elif not str(shared).startswith(BUCKETS):
        for node in ("head", "worker"):
            keys, options = _run_options(cluster, node)
            volumes = [option for option in options if re.match(r"(-v|--volume|--mount)[= ]", option)]
            if not any(re.search(rf"[=,:]{re.escape(shared)}(?=$|[:,])", volume) for volume in volumes):
                yield keys, "storage", f"a {node}'s container does not see {shared}", f"add --volume={shared}:{shared}"
        if not any(_mounts(line, shared) for line in cluster["initialization_commands"]):
            yield (
                ("initialization_commands",),
                "storage",
                f"nothing mounts {shared}: each node would have a folder of its own",
                f"mount it, or hold that it is: mountpoint {shared}",
            )


def _mounts(command: str, folder: str) -> bool:
    """Whether a command mounts something there, or fails where nothing is mounted."""
    place = re.escape(folder) + r"(?!\S)"
    mounts = re.search(rf"\b(mount|gcsfuse|mount-s3)\s[^|]*\s{place}", command)
    holds = re.search(rf"\bmountpoint\s[^|]*{place}[^|]*$", command)
    return bool(mounts or holds)


def gpus(cluster: dict[str, Any]) -> Iterator[Fault]:
    for name, kind in cluster["available_node_types"].items():
        place: Keys = ("available_node_types", name)
        node = kind.get("node_config", {})
        told = kind.get("resources", {}).get("GPU", 0)
        count = _gpus(node)
        if count is None:
            continue
        if not told:
            yield (
                (*place, "resources"),
                "gpu-resources",
                "has GPUs that Ray is not told of",
                "add GPU: their number per node",
            )
        elif count and told != count:
            yield (*place, "resources", "GPU"), "gpu-resources", f"{told}, but the node has {count}", f"set {count}"
        keys, options = _run_options(cluster, "head" if name == cluster["head_node_type"] else "worker")
        if not any(option.startswith("--gpus") for option in options):
            yield keys, "gpu-options", f"the containers of {name} do not see its GPUs", "add --gpus=all"


def scaling(cluster: dict[str, Any]) -> Iterator[Fault]:
    if cluster["provider"]["type"] == "local":
        return
    if not cluster["max_workers"]:
        yield ("max_workers",), "no-workers", "the cluster never gets a worker", "set how many nodes it may have"
    for name, kind in cluster["available_node_types"].items():
        place: Keys = ("available_node_types", name)
        if kind.get("min_workers", 0) > kind.get("max_workers", 0):
            yield (*place, "min_workers"), "no-workers", "more than max_workers", "raise max_workers"


RULES = (provider_keys, dashboard, token, containers, versions, storage, gpus, scaling)


def _run_options(cluster: dict[str, Any], node: str) -> tuple[Keys, list[str]]:
    """The options of `docker run` on a head or worker, and where to add one for all."""
    docker = cluster["docker"]
    return ("docker", "run_options"), [*docker.get("run_options", []), *docker.get(f"{node}_run_options", [])]


def _environment(options: list[str]) -> dict[str, str]:
    found = [re.match(r"(?:--env|-e)[= ](\w+)=(.*)", option) for option in options]
    return {match[1]: match[2] for match in found if match}


def _gpus(node: dict[str, Any]) -> int | None:
    """How many GPUs a cloud's node has; 0 where it has some, None where it has none."""
    accelerators = node.get("guestAccelerators") or []
    if accelerators:
        return sum(int(a.get("acceleratorCount", 0)) for a in accelerators)
    if AWS_GPUS.match(node.get("InstanceType", "")):
        return 0
    machine = node.get("machineType", "").rpartition("/")[2]
    if GCP_GPUS.match(machine):
        count = re.search(r"(\d+)g$", machine)
        return int(count[1]) if count else 0
    return None


def _strings(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, (*keys, key))


def _line(root: yaml.Node, keys: Keys) -> int:
    """Of the nearest part of the path that the file has; the rest may be Ray's default."""
    node, line = root, root.start_mark.line
    for key in keys:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((name, value) for name, value in node.value if name.value == str(key)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            found = node.value[key], node.value[key]
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1
