"""Who gives way on a busy machine: what Ray is started with everywhere, who lowers itself, and who tells of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import yaml

from raymodels import doctor, niceness
from raymodels.data import parallel
from raymodels.serve.proxy import IN_PROXIES

ROOT = Path(__file__).parents[2]
KEPT = f"{niceness.VARIABLE}={niceness.SERVER}"


@pytest.mark.parametrize("file", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda file: file.name)
def test_every_cluster_starts_ray_with_it(file: Path) -> None:
    assert f"--env={KEPT}" in yaml.safe_load(file.read_text())["docker"]["run_options"]


def test_the_image_has_it() -> None:
    assert KEPT in (ROOT / "cluster" / "Dockerfile").read_text()


@pytest.mark.parametrize("file", ["base/serve.yaml", "base/train.yaml", "components/nightly-evaluation/evaluate.yaml"])
def test_every_pod_of_ray_has_it(file: str) -> None:
    wanted = {niceness.VARIABLE: str(niceness.SERVER)} | (IN_PROXIES if "serve" in file else {})
    found = environments(list(yaml.safe_load_all((ROOT / "k8s" / file).read_text())))
    assert len(found) == 2  # head and workers
    for environment in found:
        assert wanted.items() <= environment.items()


def environments(node: object) -> list[dict[str, str]]:
    """Those of all containers below a node of YAML in which Ray is started."""
    if isinstance(node, list):
        return [found for entry in node for found in environments(entry)]
    if not isinstance(node, dict):
        return []
    if node.get("name") in ("ray-head", "ray-worker"):
        return [{entry["name"]: entry.get("value", "") for entry in node["env"]}]
    return environments(list(node.values()))


def test_who_gives_way_takes_along_what_it_starts_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(niceness.OVERRIDE)
    before, found = niceness.current(), []

    def work() -> None:
        niceness.give_way()
        niceness.give_way()  # once is enough
        inner = threading.Thread(target=lambda: found.append(niceness.current()))
        inner.start()
        inner.join()
        found.append(niceness.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [max(before, niceness.BEHIND)] * 2
    assert niceness.current() == before


def own_niceness(_: int) -> int:
    return niceness.current()


def test_preparing_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(niceness.OVERRIDE, "7")
    assert set(parallel._on_processes(own_niceness, [1, 2], 2)) == {max(niceness.current(), 7)}


@pytest.mark.parametrize(
    ("environ", "ok", "detail"),
    [
        (f"PATH=/bin\0{KEPT}\0", True, KEPT),
        ("PATH=/bin\0", False, "1 of 1 Ray nodes here let other processes go before what they serve"),
        (None, True, f"no Ray runs here: raymodels starts it with {KEPT}"),
    ],
)
def test_the_doctor_tells_of_a_ray_that_was_started_otherwise(
    tmp_path: Path, environ: str | None, ok: bool, detail: str
) -> None:
    for name, comm, text in (("1", "init", ""), (str(os.getpid()), "raylet", environ)):
        if text is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "comm").write_text(comm + "\n")
            (tmp_path / name / "environ").write_text(text)
    check = doctor._niceness(tmp_path)
    assert (check.ok, check.detail, check.optional) == (ok, detail, True)
    assert ok or niceness.VARIABLE in check.remedy
