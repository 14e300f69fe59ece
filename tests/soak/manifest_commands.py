"""The commands of the RayJob, the RayService and the RayCronJob, run as they stand in the rendered manifests.

`k8s/overlays/local` is rendered, and each of its pods gets a host of its own (`tests.soak.hosts`: needs root), on
which its container runs the command that KubeRay's operator writes for it (`tests.soak.pods`): `ray start` with the
token, the submitter's script with the entrypoint in it. What the job has published is then served by a second cluster,
to which serveConfigV2 is sent as the operator sends it, and called with an API key. The entrypoint of the nightly
evaluation, from `production-nightly`, runs on the job's cluster. No command is changed: smaller configs lie at the
paths that they name.

The bars: the jobs SUCCEEDED, the service waited for what the job publishes and then answers, all probes say success,
Ray's ports refuse whoever has no token and the gateway whoever has no key, and neither secret stands in a log, on the
shared volume or in the arguments of any process.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Bar, report
from raymodels.config import dump, load
from raymodels.k8s import files, kustomize
from raymodels.registry import Registry
from tests.soak import hosts, pods
from tests.soak.hosts import Host, network
from tests.soak.pods import (
    AGENT_PORT,
    BASH,
    DASHBOARD_PORT,
    STRICT_BASH,
    Kubernetes,
    image_folder,
    ray_env,
    ray_start,
    serve_probe,
    submission,
)
from tests.soak.size import small

K8S = Path(__file__).parents[2] / "k8s"
CLI = str(Path(sys.executable).parent / "raymodels")
LONGEST_S = 300.0
SAMPLE_S = 0.3
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SHARED = ("run.storage=/mnt/shared/runs", "data.prepared=/mnt/shared/prepared", "registry=/mnt/shared/registry")


class Watch:
    """Looks for secrets in the arguments of all processes of the machine, as long as it is entered."""

    def __init__(self, needles: Sequence[str]) -> None:
        self.needles = [needle.encode() for needle in needles]
        self.found: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    arguments = place.read_bytes()
                except OSError:  # it has ended
                    continue
                if any(needle in arguments for needle in self.needles):
                    self.found.add(arguments.replace(b"\0", b" ").decode(errors="replace")[:300])

    def files(self, folders: Iterable[Path]) -> list[str]:
        """Those below the folders that have a secret in them."""
        there = (place for folder in folders for place in sorted(folder.rglob("*")) if place.is_file())
        return [str(place) for place in there if any(needle in place.read_bytes() for needle in self.needles)]


@dataclass
class Line:
    """What happens on the way: a row of the table each, and what the bars count."""

    kubernetes: Kubernetes
    watch: Watch
    rows: list[dict[str, Any]] = field(default_factory=list)
    probed: list[bool] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)
    waited: bool = False
    """Whether the service did so for the job."""
    leaks: list[str] = field(default_factory=list)
    """Files that have a secret in them."""

    def row(self, what: str, start: float, outcome: str) -> None:
        self.rows.append({"what": what, "seconds": time.monotonic() - start, "outcome": outcome})
        print(f"{what}: {outcome}", flush=True)

    def get(self, host: Host, url: str) -> Any:
        status, text = self.kubernetes.ask(host, url, self.kubernetes.token)
        if status != 200:
            raise ConnectionError(f"{url}: {status} {text}")
        return json.loads(text)

    def until(self, told: str, look: Callable[[], Any]) -> Any:
        """What ``look`` says, once that is something; what it asks may not answer yet."""
        deadline, last = time.monotonic() + LONGEST_S, ""
        while time.monotonic() < deadline:
            try:
                if found := look():
                    return found
            except ConnectionError as error:
                last = str(error)
            time.sleep(1)
        ends = [f"{log}:\n{log.read_text()[-3000:]}" for log in self.kubernetes.folder.glob("*.log")]
        sys.exit("\n".join([*ends, f"not within {LONGEST_S:g} s: {told}; {last}"]))

    def refuses(self, host: Host, url: str, method: str = "GET", body: Any = None) -> None:
        """Whoever has no token or key, and whoever has another."""
        for token in (None, "0" * 64):
            status, _ = self.kubernetes.ask(host, url, token, body, method)
            self.refused.append(status in (401, 403))
            print(f"{method} {url} with {'another' if token else 'no'} token: {status}", flush=True)

    def search(self, hosts: Sequence[Host]) -> None:
        """What Ray has logged on hosts that still run."""
        self.leaks += self.watch.files(map(logs, hosts))


def logs(host: Host) -> Path:
    return Path(f"/proc/{host.init}/root/tmp/ray")


def smaller(app: Path, steps: int) -> None:
    """Other configs where the entrypoints find theirs; the evaluation's is of the run that is trained here."""
    told = [f"data.source={sysconfig.get_path('stdlib')}/asyncio/*.py", "data.eval_fraction=0.2", "data.seq_len=64"]
    told += ["model.hidden_size=64", "model.layers=2", "model.heads=4", "eval.samples=8"]
    told += [f"train.steps={steps}", f"eval.every={steps}", f"checkpoint.every={steps // 2}"]
    demo = app / "jobs/configs/demo.yaml"
    evaluated, trained = load(demo, [*told, *SHARED]), load(demo, told)
    (app / "jobs/configs/pretrain-1b.yaml").write_text(yaml.safe_dump(dump(evaluated)))
    demo.write_text(yaml.safe_dump(dump(trained)))


def ray_cluster(line: Line, kind: str, spec: dict[str, Any], hosts: list[Host], outside: Host) -> str:
    """Its head on the first host, its workers on the others; the dashboard's address, once all nodes are there."""
    start, head = time.monotonic(), hosts[0].address
    address = f"http://{head}:{DASHBOARD_PORT}"
    workers = [group for group in spec["workerGroupSpecs"] for _ in range(group["replicas"])]
    for host, group in zip(hosts, [spec["headGroupSpec"], *workers], strict=True):
        command = ray_start(group, head)
        print(f"{host.name}: {command}", flush=True)
        env = ray_env(kind, group, head, command)
        line.kubernetes.start(host, group["template"]["spec"], [*BASH, command], env)
        if host is hosts[0]:
            line.until("the head answers", lambda: line.get(outside, f"{address}/api/version"))
    nodes = f"{address}/nodes?view=summary"
    line.until("all nodes are there", lambda: len(line.get(outside, nodes)["data"]["summary"]) == len(hosts))
    line.row(f"{kind}: ray start on {len(hosts)} pods", start, "up")
    for host in hosts:
        status, text = line.kubernetes.ask(outside, f"http://{host.address}:{AGENT_PORT}/api/healthz")
        line.probed.append(status == 200 and "success" in text)
    return address


def job(line: Line, spec: dict[str, Any], name: str, address: str, outside: Host) -> bool:
    """A RayJob's entrypoint on a cluster that is there, from the submitter's pod; whether it SUCCEEDED."""
    start, pod = time.monotonic(), spec["submitterPodTemplate"]["spec"]
    script = submission(spec, address, name)
    print(f"{outside.name}: {script}", flush=True)
    env = {"PYTHONUNBUFFERED": "1", "RAY_DASHBOARD_ADDRESS": address, "RAY_JOB_SUBMISSION_ID": name}
    submitter = line.kubernetes.start(outside, pod, [*STRICT_BASH, script], env)

    def ended() -> str | None:
        status = line.get(outside, f"{address}/api/jobs/{name}")["status"]
        return status if status in ENDED else None

    status = str(line.until(f"the end of {name}", ended))
    followed = submitter.wait(60)
    line.row(f"{name}: {spec['entrypoint'].split()[1]}", start, f"{status}, its submitter exits with {followed}")
    if status != "SUCCEEDED":
        print(line.get(outside, f"{address}/api/jobs/{name}/logs")["logs"][-6000:])
    return status == "SUCCEEDED" and followed == 0


def jobs(line: Line, train: dict[str, Any], evaluate: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the training and the evaluation SUCCEEDED."""
    workers = train["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    with network(workers + 2, line.kubernetes.folder) as hosts:
        *pods, outside = hosts
        address = ray_cluster(line, "RayJob", train["rayClusterSpec"], pods, outside)
        line.refuses(outside, f"{address}/api/jobs/")
        line.refuses(outside, f"{address}/api/jobs/", "POST", {"entrypoint": "true"})
        done = job(line, train, "train", address, outside), job(line, evaluate, "evaluate", address, outside)
        line.search(hosts)
    return done


def service(line: Line, told: dict[str, Any], key: Path) -> str:
    """The version that answers a holder of a key; empty if none does."""
    spec = told["rayClusterConfig"]
    [group] = spec["workerGroupSpecs"]
    with network(group["replicas"] + 2, line.kubernetes.folder) as hosts:
        *pods, outside = hosts
        address = ray_cluster(line, "RayService", spec, pods, outside)
        place, config, start = (
            f"{address}/api/serve/applications/",
            files.parse(told["serveConfigV2"]),
            time.monotonic(),
        )
        line.refuses(outside, place, "PUT", config)
        with unpublished(line.kubernetes):
            status, text = line.kubernetes.ask(outside, place, line.kubernetes.token, config, "PUT")
            assert status == 200, text
            line.until("the application waits for the job", lambda: logged(pods, "waiting for python-demo@prod"))
            line.waited = statuses(line, outside, place) == {"DEPLOYING"}
        line.until("all applications are RUNNING", lambda: statuses(line, outside, place) == {"RUNNING"})
        line.row("RayService: PUT serveConfigV2", start, "RUNNING")
        for host in pods[1:]:
            probe = line.kubernetes.start(
                host, group["template"]["spec"], ["bash", "-c", serve_probe(group)], {}, "probe"
            )
            line.probed.append(probe.wait(60) == 0)
        found = called(line, f"http://{pods[1].address}:8000", key, outside)
        line.search(hosts)
    return found


@contextmanager
def unpublished(kubernetes: Kubernetes) -> Iterator[None]:
    """As it is before the job has published anything: `kubectl apply -k` makes both at once."""
    registry = kubernetes.shared / "registry"
    away = registry.rename(kubernetes.folder / "away")
    yield
    away.rename(registry)


def logged(hosts: Sequence[Host], text: str) -> bool:
    """Whether a process of Ray's on one of the hosts has printed it."""
    files = (file for host in hosts for file in logs(host).glob("session_*/logs/worker-*.out"))
    return any(text in file.read_text(errors="replace") for file in files)


def statuses(line: Line, outside: Host, place: str) -> set[str]:
    shown = line.get(outside, f"{place}?api_type=declarative")["applications"]
    return {application["status"] for application in shown.values()}


def called(line: Line, url: str, key: Path, outside: Host) -> str:
    """As k8s/README.md calls it, on the port of a worker's pod, which the Service leads to."""
    line.refuses(outside, f"{url}/v1/models")
    start = time.monotonic()
    status, text = line.kubernetes.ask(outside, f"{url}/v1/models", key.read_text().strip(), header="Authorization")
    command = [CLI, "complete", "def ", "--max-tokens", "8", "--api-key-file", str(key), "--url", url]
    done = subprocess.run(outside.entered(command), capture_output=True, text=True, timeout=120)
    line.row("RayService: a completion", start, f"{done.stdout + done.stderr!r}, exit code {done.returncode}")
    return str(json.loads(text)["data"][0]["root"]) if status == 200 and done.returncode == 0 and done.stdout else ""


def rendered(overlay: str) -> list[dict[str, Any]]:
    return [value for value, _ in kustomize.render(K8S / "overlays" / overlay)]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [value["spec"] for value in objects if value["kind"] == kind]
    return found


def main() -> int:
    steps = 20 if small() else 100
    why = "" if shutil.which("kubectl") or shutil.which("kustomize") else "kubectl is not installed"
    if why := why or hosts.missing() or pods.missing():
        print(f"skipped: {why}")
        return 0
    local, nightly = rendered("local"), rendered("production-nightly")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        app, key, keys = image_folder(folder), folder / "alice.key", folder / "keys.yaml"
        smaller(app, steps)
        with key.open("w") as file:
            subprocess.run([CLI, "keys", "add", "alice", "--file", str(keys)], stdout=file, check=True)
        kubernetes = Kubernetes(
            local, {"serve-keys": {"keys.yaml": keys.read_text()}}, app, folder, secrets.token_hex(32)
        )
        with Watch([kubernetes.token, key.read_text().strip()]) as watch:
            line = Line(kubernetes, watch)
            trained, evaluated = jobs(line, of_kind(local, "RayJob"), of_kind(nightly, "RayCronJob")["jobTemplate"])
            answered = service(line, of_kind(local, "RayService"), key)
            published = Registry(str(kubernetes.shared / "registry")).resolve("python-demo@prod").reference
        leaks = {*line.leaks, *watch.files([folder])} - {str(key)}
    for place in sorted({*leaks, *watch.found}):
        print(f"a secret stands in {place}")
    bars = [
        Bar("job_succeeded", int(trained), "==", 1),
        Bar("evaluation_succeeded", int(evaluated), "==", 1),
        Bar("service_waited_for_the_job", int(line.waited), "==", 1),
        Bar("published_version_answered", int(answered == published), "==", 1),
        Bar(f"probes_of_{len(line.probed)}", sum(line.probed), "==", len(line.probed)),
        Bar(f"refused_of_{len(line.refused)}", sum(line.refused), "==", len(line.refused)),
        Bar("files_with_a_secret", len(leaks), "==", 0),
        Bar("processes_with_a_secret", len(watch.found), "==", 0),
    ]
    return report("manifest_commands", line.rows, bars)


if __name__ == "__main__":
    sys.exit(main())
