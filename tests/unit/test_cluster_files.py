"""The cluster launcher's files and the image: accepted by Ray's own check and ours, and true to this repository."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymodels
from raymodels.cluster_files import ANY_PROVIDER, PROVIDER_KEYS, check
from raymodels.errors import ConfigError

pytestmark = pytest.mark.slow
pytest.importorskip("ray.autoscaler._private.util")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))

# In which file, what is changed into what (none: removed), the rule that must say so, and the path it must name.
MISTAKES = [
    ("aws", "  region: us-west-2", "  regoin: us-west-2", "provider-key", "provider.regoin"),
    ("on-prem", "  head_ip:", "  head-ip:", "ray", "file"),
    ("gcp", "  image: us-", "  imagge: us-", "ray", "docker.imagge"),
    ("gcp", "idle_timeout_minutes: 15", "idle_timeout_minutes: soon", "ray", "idle_timeout_minutes"),
    ("aws", "head_node_type: head", "head_node_type: heat", "ray", "file"),
    (
        "on-prem",
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        "public-dashboard",
        "head_start_ray_commands.1",
    ),
    ("aws", "head_start_ray_commands:", "metadata2:", "ray", "metadata2"),
    (
        "aws",
        "    GroupName: raymodels",
        "    IpPermissions: [{FromPort: 8265, ToPort: 8265, IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}]",
        "open-ingress",
        "provider.security_group.IpPermissions.0",
    ),
    ("gcp", "    - --env=RAY_AUTH_MODE=token\n", "", "no-token", "docker.run_options"),
    ("aws", "  /home/ray/.ray/auth_token: ~", "  /home/ray/token: ~", "no-token", "file_mounts"),
    ("on-prem", "--env=RAY_USAGE_STATS_ENABLED=0", "--env=RAY_AUTH_TOKEN=abc", "token-shown", "docker.run_options.6"),
    ("on-prem", "    - --shm-size=64g", "    - --init", "no-shm", "docker.run_options"),
    ("gcp", "    - --shm-size=128g", "    - --init", "no-shm", "docker.run_options"),
    ("aws", "    - --ulimit=memlock=-1\n", "", "no-ulimit", "docker.run_options"),
    ("on-prem", "ray2.60.0", "ray2.59.0", "image-version", "docker.image"),
    ("on-prem", ":0.1.0-ray2.60.0-cuda", ":latest", "image-version", "docker.image"),
    ("aws", r"setup_commands: \[\]\n", "", "image-version", "setup_commands.1"),
    ("aws", "    - --volume=/mnt/shared:/mnt/shared\n", "", "storage", "docker.run_options"),
    ("gcp", "sudo mount -t nfs .* /mnt/shared", "true", "storage", "initialization_commands"),
    ("on-prem", "  - mountpoint -q /mnt/shared", "  - 'true'", "storage", "initialization_commands"),
    ("aws", "metadata:\n  shared_storage: /mnt/shared\n", "", "storage", "metadata.shared_storage"),
    (
        "aws",
        "resources: {CPU: 192, GPU: 8}",
        "resources: {CPU: 192}",
        "gpu-resources",
        "available_node_types.gpu.resources",
    ),
    ("gcp", "CPU: 96, GPU: 8", "CPU: 96, GPU: 4", "gpu-resources", "available_node_types.gpu.resources.GPU"),
    ("gcp", "    - --gpus=all\n", "", "gpu-options", "docker.run_options"),
    ("aws", "max_workers: 4\nups", "max_workers: 0\nups", "no-workers", "max_workers"),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_is_wrong_with_the_files(file: Path) -> None:
    assert [str(finding) for finding in check(file)] == []


def test_there_is_a_file_for_each_kind_of_machine() -> None:
    assert [file.stem for file in FILES] == ["aws", "gcp", "on-prem"]


@pytest.mark.parametrize("name, old, new, rule, path", MISTAKES, ids=[f"{m[0]}-{m[3]}-{m[4]}" for m in MISTAKES])
def test_a_planted_mistake_is_found(name: str, old: str, new: str, rule: str, path: str, tmp_path: Path) -> None:
    text = (ROOT / f"cluster/{name}.yaml").read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    (tmp_path / "cluster.yaml").write_text(changed)
    findings = check(tmp_path / "cluster.yaml")
    found = [finding for finding in findings if (finding.rule, finding.path) == (rule, path)]
    assert found, [str(finding) for finding in findings]
    assert {finding.rule for finding in findings} == {rule}, "and nothing else"


def test_a_finding_names_the_line_and_the_remedy(tmp_path: Path) -> None:
    text = (ROOT / "cluster/on-prem.yaml").read_text()
    (tmp_path / "cluster.yaml").write_text(text.replace("127.0.0.1", "0.0.0.0"))
    [finding] = check(tmp_path / "cluster.yaml")
    line = text.splitlines().index("head_start_ray_commands:") + 3
    assert (finding.line, finding.remedy) == (
        line,
        "give --dashboard-host=127.0.0.1; `ray dashboard` forwards it by ssh",
    )
    assert str(finding).startswith(f"{tmp_path}/cluster.yaml:{line}: head_start_ray_commands.1: public-dashboard: ")


@pytest.mark.parametrize("text", ["[1]", "a: [", "cluster_name: x"])
def test_what_is_no_launchers_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"cluster.yaml is no"):
        check(tmp_path / "cluster.yaml")


@pytest.mark.parametrize("kind", PROVIDER_KEYS)
def test_the_keys_of_providers_are_those_that_ray_reads(kind: str) -> None:
    """Ray has no list of them, so each must at least be a word of its source."""
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private"
    source = "".join(path.read_text() for path in [*folder.glob("*.py"), *(folder / kind).rglob("*.py")])
    for key in PROVIDER_KEYS[kind] | ANY_PROVIDER:
        assert f'"{key}"' in source, key


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_image_is_this_release(file: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    [pin] = {line.partition("==")[2] for extra in extras.values() for line in extra if line.startswith("ray[")}
    image = yaml.safe_load(file.read_text())["docker"]["image"]
    assert image.rpartition("/")[2] == f"raymodels:{raymodels.__version__}-ray{pin}-cuda"


@pytest.mark.parametrize("name, market", [("aws", "InstanceMarketOptions"), ("gcp", "scheduling")])
def test_spot_nodes_are_there_to_be_chosen(name: str, market: str) -> None:
    types: dict[str, Any] = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())["available_node_types"]
    assert "spot" in str(types["gpu-spot"]["node_config"][market]).lower()
    assert types["gpu-spot"]["max_workers"] == 0
    assert types["gpu-spot"]["resources"] == types["gpu"]["resources"]


def test_work_stays_off_the_head() -> None:
    for file in FILES:
        [start] = [line for line in yaml.safe_load(file.read_text())["head_start_ray_commands"] if "--head" in line]
        assert "--num-cpus=0" in start


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source


def test_the_image_is_not_root_and_has_what_probes_call() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] not in ("root", "0")
    assert {"bash", "wget", "g++", "openssh-client", "rsync"} <= set(re.findall(r"[\w+-]+", text))
    assert "/opt/venv/bin" in re.findall(r"echo .* > /etc/profile.d", text)[0]
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
