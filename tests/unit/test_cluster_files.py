"""The cluster launcher's file and the image: accepted by Ray's own check, and true to this repository."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymodels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Ray takes any key here; these are the ones that its on-prem provider reads.
PROVIDER_KEYS = {"type", "head_ip", "worker_ips", "coordinator_address"}


@pytest.fixture
def raw() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((ROOT / "cluster/on-prem.yaml").read_text())
    return told


@pytest.fixture(scope="module")
def ray_pin() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    [pin] = {line.partition("==")[2] for extra in extras.values() for line in extra if line.startswith("ray[")}
    return pin


def test_ray_accepts_the_cluster(raw: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(raw))
    assert raw["provider"].keys() <= PROVIDER_KEYS


def test_ray_refuses_a_misspelt_key(raw: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    import jsonschema

    raw["docker"]["imagge"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagge"):
        util.validate_config(util.prepare_config(raw))


def test_the_cluster_demands_a_token(raw: dict[str, Any]) -> None:
    options = raw["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    [path] = [option.rpartition("=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert path in raw["file_mounts"]


def test_the_dashboard_is_the_heads_alone(raw: dict[str, Any]) -> None:
    [start] = [line for line in raw["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start


def test_the_image_is_this_release(raw: dict[str, Any], ray_pin: str) -> None:
    assert raw["docker"]["image"] == f"raymodels:{raymodels.__version__}-ray{ray_pin}-cuda"


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source


def test_the_image_is_not_root_and_has_what_probes_call() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] not in ("root", "0")
    assert {"bash", "wget", "g++"} <= set(re.findall(r"[\w+-]+", text))
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
