"""One of this checkout's jobs, submitted once however often it is asked for under the same id."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymodels import storage
from raymodels.config import ServeConfig, load
from raymodels.errors import ClusterError, ClusterLost, ConfigError
from raymodels.submit.connect import Cluster, Unreachable, connect, goes_in_clear
from raymodels.submit.follow import POLL_S, Following, insist
from raymodels.submit.pack import pack
from raymodels.submit.state import STOP_S, JobResult, as_state, await_end, succeeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.job_submission import JobDetails

Job = Literal["train", "serve", "evaluate", "prepare"]
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
TREE = "raymodels_tree"
LOST_AFTER_S = 300.0
START_S = 60.0
"""How long to try to submit: a cluster that has just started answers before it takes jobs."""
SETUP_S = 840
"""How long a lock's packages may take; after 15 minutes Ray gives up a job that has not started, and says less."""


@dataclass(frozen=True)
class Submission:
    """What is asked of the cluster for the job's own process; its workers ask for theirs.

    Args:
        id: the job's name; default: derived from the command, its resources and the files that are sent.
        again: run it once more if it is over.
        cpus, gpus, memory, resources: reserved for the entrypoint; none: it runs on the head node. Memory in bytes.
        lock: a requirements file to install on every node before the job starts, with uv; Ray keeps the result for
            the next job. None: the image's packages.
    """

    id: str | None = None
    again: bool = False
    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    lock: Path | None = None

    def entrypoint_options(self) -> dict[str, Any]:
        """As Ray's `submit_job` takes them."""
        named = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory, "resources": self.resources}
        return {f"entrypoint_{name}": value for name, value in named.items() if value}


def submit(
    config_path: str | Path,
    *,
    address: str | None = None,
    ca: str | Path | None = None,
    job: Job = "train",
    overrides: Sequence[str] = (),
    working_dir: str | Path = ".",
    submission: Submission | None = None,
    wait: bool = True,
    follow: Callable[[str], object] = print,
    notice: Callable[[str], object] | None = None,
    lost_after_s: float = LOST_AFTER_S,
) -> JobResult:
    """Run ``jobs/<job>.py`` with a config on a cluster, once: a repeated call attaches to the job that it finds.

    Args:
        config_path: lies inside ``working_dir``; it is checked here before anything is sent.
        address, ca: as of `connect`.
        overrides: ``section.key=value`` each.
        working_dir: what is sent, without histories, environments, caches and results.
        wait: follow the job to its end; otherwise return once it is accepted, or raise if it has ended badly already.
        follow: called with each line of the job's log.
        notice: called with what one should know beside it; default: ``follow``.
        lost_after_s: how long the cluster may not answer before it is taken for lost.

    Raises:
        ConfigError: the config is wrong or lies outside ``working_dir``, that is too large, or the id is another job's.
        ClusterError: the cluster is not there, or refuses the token or the job.
        ClusterLost: it stopped answering while the job was sent or followed.
        JobError: the job failed.
        JobStopped: it was stopped.
    """
    started = time.monotonic()
    asked = submission or Submission()
    how = Following(follow, notice or follow, lost_after_s)
    script, config = _inside(Path(config_path), Path(working_dir), job, overrides, how.notice)
    entrypoint = shlex.join(["python", script, config, *(word for each in overrides for word in ("--set", each))])
    env = environment(asked)
    if asked.id is not None and not ID.fullmatch(asked.id):
        raise ConfigError(f"--id {asked.id!r}: give letters, digits, - and _, at most 100")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tree.zip"
        pack(Path(working_dir), archive, needed=[script, config])
        tree = hashlib.sha256(archive.read_bytes()).hexdigest()
        name = asked.id or _derived_id(job, Path(config_path), [entrypoint, asked.entrypoint_options(), env, tree])
        cluster = connect(address, ca)
        if goes_in_clear(cluster.address):
            how.notice(
                f"note: the token goes to {cluster.address} in clear text: use https, or forward the port by ssh"
            )
        wanted = _Wanted(name, entrypoint, {"working_dir": str(archive), **env}, tree, asked)
        info = _attach_or_start(cluster, wanted, how)
    job_id = info.submission_id or name
    if wait:
        info = await_end(cluster, job_id, how)
    elif info.status.is_terminal():
        succeeded(cluster, info)
    return JobResult(job_id, info.status.value, time.monotonic() - started, cluster.address)


@dataclass(frozen=True)
class _Wanted:
    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    tree: str
    asked: Submission


def _attach_or_start(cluster: Cluster, wanted: _Wanted, how: Following) -> JobDetails:
    """The job of that name if there is one, or a new one."""
    found, next_id = _newest(cluster, wanted.name)
    if found is not None and not (wanted.asked.again and found.status.is_terminal()):
        return _attach(found, wanted, how.notice)
    if found is not None:
        _must_be_the_same(found, wanted)
    deadline = time.monotonic() + START_S
    while True:
        try:
            cluster.ask(
                lambda client: client.submit_job(
                    submission_id=next_id,
                    entrypoint=wanted.entrypoint,
                    runtime_env=wanted.runtime_env,
                    metadata={TREE: wanted.tree},
                    **wanted.asked.entrypoint_options(),
                )
            )
            break
        except Unreachable as error:
            trouble: ClusterError = error
        try:
            if (there := cluster.find(next_id)) is not None:  # another client was faster, or the answer alone was lost
                return _attach(there, wanted, how.notice)
        except Unreachable as error:
            trouble = ClusterLost(f"{error} {next_id} may have been taken: the same submit again attaches to it")
        if time.monotonic() > deadline:
            raise trouble
        time.sleep(POLL_S)
    how.notice(f"{next_id}: {wanted.entrypoint}")
    return insist(cluster, next_id, how, lambda client: client.get_job_info(next_id))


def _newest(cluster: Cluster, name: str) -> tuple[JobDetails | None, str]:
    """The last of a name's jobs NAME, NAME.2, NAME.3 ..., and the id for the next. No name has a dot."""
    found, number, job_id = None, 1, name
    while (info := cluster.find(job_id)) is not None:
        found, number = info, number + 1
        job_id = f"{name}.{number}"
    return found, job_id


def _attach(info: JobDetails, wanted: _Wanted, notice: Callable[[str], object]) -> JobDetails:
    _must_be_the_same(info, wanted)
    state = as_state(info)
    if (info.metadata or {}).get(TREE) != wanted.tree:
        notice(f"note: {state.submission_id} was submitted from another state of the files here")
    if state.over:
        notice(f"{state.submission_id} is over: {state.status} after {state.seconds or 0:.0f} s; --again runs it again")
    else:
        notice(f"{state.submission_id} is {state.status} already; this attaches to it")
    return info


def _must_be_the_same(info: JobDetails, wanted: _Wanted) -> None:
    if info.entrypoint != wanted.entrypoint:
        raise ConfigError(
            f"--id {wanted.name} is taken by another job, {info.submission_id} ({info.status.value}): "
            f"{info.entrypoint}; give another --id, or none"
        )


def _derived_id(job: Job, config: Path, contents: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]
    return "-".join([job, re.sub(r"[^A-Za-z0-9]+", "-", config.stem).strip("-")[:40], digest])


def environment(asked: Submission) -> dict[str, Any]:
    """What the job's processes run in, beside the working tree.

    Packages are the image's unless a lock is given: for one, Ray copies the whole environment of the image on every
    node and installs into the copy. It keeps that for jobs with the same lock, and uv keeps what it downloaded.
    """
    env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    if asked.lock is None:
        return env
    try:
        lines = [line.partition(" #")[0].strip() for line in asked.lock.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"--lock: cannot read {asked.lock}: {error.strerror}") from error
    packages = [line for line in lines if line and not line.startswith("#")]
    if not packages:
        raise ConfigError(f"--lock: {asked.lock} names no package")
    config = {"setup_timeout_seconds": SETUP_S}
    return {**env, "uv": {"packages": packages, "uv_pip_install_options": []}, "config": config}


def _inside(
    path: Path, working_dir: Path, job: Job, overrides: Sequence[str], notice: Callable[[str], object]
) -> tuple[str, str]:
    """The job's script and its config, checked, as paths within what is sent."""
    try:
        inside = path.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(
            f"config {path} lies outside working_dir {working_dir}, which is all that the cluster gets: "
            "move it inside, or submit from a folder that holds it"
        ) from None
    script = f"jobs/{job}.py"
    if not (working_dir / script).is_file():
        raise ConfigError(f"working_dir {working_dir} has no {script}: submit from a checkout of raymodels")
    for setting, value in _places(path, job, list(overrides)).items():
        if storage.is_local(value) and not Path(value).is_absolute():
            notice(f"note: {setting} {value} is relative, so it means the job's own folder, gone with the cluster")
    return script, inside.as_posix()


def _places(path: Path, job: Job, overrides: list[str]) -> dict[str, str]:
    """Check the config; the settings that say where results go or come from."""
    if job == "serve":
        return {"registry": load(path, overrides, ServeConfig).registry}
    config = load(path, overrides)
    places = {"run.storage": config.run.storage, "data.prepared": config.data.prepared}
    return {**places, "registry": config.registry} if config.publish else places
