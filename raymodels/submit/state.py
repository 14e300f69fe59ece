"""What a cluster's jobs are doing, and how each ended."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymodels.errors import ConfigError, JobError, JobStopped, RaymodelsError
from raymodels.submit.connect import Cluster, Unreachable
from raymodels.submit.follow import POLL_S, Following, follow

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

STOP_S = 120
"""How long a job that is stopped may take to commit its last step and leave; Ray's own default is 3 s."""
STOP_SLACK_S = 30.0
PENDING_S = 10.0
"""How long to wait for the end of a job that has not started: Ray stops it only as it starts."""
OVER = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True)
class JobResult:
    """A job as last seen. ``status`` is SUCCEEDED, or PENDING or RUNNING where it was not waited for."""

    submission_id: str
    status: str
    seconds: float
    address: str


@dataclass(frozen=True)
class JobState:
    """A job as its cluster tells of it. Times are seconds since 1970; ``message`` is Ray's, of one line or many."""

    submission_id: str
    status: str
    entrypoint: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def seconds(self) -> float | None:
        """From its submission to its end, or to now."""
        return None if self.started is None else (self.ended or time.time()) - self.started

    @property
    def cause(self) -> str:
        """The message in a line: where it holds a traceback or a log, its head and its end."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        return " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def error(self) -> type[RaymodelsError] | None:
        """What `submit` raises for such an end."""
        return {"FAILED": JobError, "STOPPED": JobStopped}.get(self.status)


def job_state(cluster: Cluster, job_id: str) -> JobState:
    """One job.

    Raises:
        ConfigError: the cluster has no such job.
        ClusterError: it does not answer.
    """
    info = cluster.find(job_id)
    if info is None:
        raise ConfigError(f"the cluster at {cluster.address} has no job {job_id}: raymodels list {cluster.options}")
    return as_state(info)


def list_jobs(cluster: Cluster) -> list[JobState]:
    """Every submitted job that the cluster remembers, the newest first."""
    states = [as_state(info) for info in cluster.ask(lambda client: client.list_jobs()) if info.submission_id]
    return sorted(states, key=lambda state: state.started or 0.0, reverse=True)


def logs(cluster: Cluster, job_id: str, how: Following, to_the_end: bool = False) -> JobState:
    """Show a job's log: what there is of it, or all of it until the job ends.

    Raises:
        JobError, JobStopped: with ``to_the_end``, the job ended so.
        ConfigError, ClusterError: as `job_state` and `follow`.
    """
    state = job_state(cluster, job_id)
    if to_the_end:
        return as_state(await_end(cluster, job_id, how))
    for line in cluster.ask(lambda client: client.get_job_logs(job_id)).splitlines():
        how.line(line)
    return state


def stop(cluster: Cluster, job_id: str, wait: bool = True) -> JobState:
    """Ask a job to end, and wait until it has; one that is over is left as it is.

    One that still waits for resources is returned as PENDING: Ray stops it as it starts.

    Raises:
        ConfigError: the cluster has no such job.
        JobError: it is not known to have ended long after the time it was given.
    """
    state = job_state(cluster, job_id)
    if state.over:
        return state
    cluster.ask(lambda client: client.stop_job(job_id))
    asked = time.monotonic()
    while wait and not state.over:
        waited = time.monotonic() - asked
        if state.status == "PENDING" and waited > PENDING_S:
            break
        if waited > STOP_S + STOP_SLACK_S:
            raise JobError(f"{job_id} was {state.status} {waited:.0f} s after it was asked to stop: see its log")
        time.sleep(POLL_S)
        with contextlib.suppress(Unreachable):
            state = job_state(cluster, job_id)
    return state


def await_end(cluster: Cluster, job_id: str, how: Following) -> JobDetails:
    """Follow a job to its end.

    Raises:
        JobError: it failed.
        JobStopped: somebody stopped it.
    """
    try:
        info, last_line = follow(cluster, job_id, how)
    except KeyboardInterrupt:
        how.notice(f"{job_id} goes on without you; stop it with: raymodels stop {job_id} {cluster.options}")
        raise
    return succeeded(cluster, info, last_line)


def succeeded(cluster: Cluster, info: JobDetails, last_line: str = "") -> JobDetails:
    """The same job, which is over.

    Raises:
        JobError: it failed: with its last line, or with Ray's words where its process did not come to an end.
        JobStopped: somebody stopped it.
    """
    state = as_state(info)
    if state.status == "STOPPED":
        raise JobStopped(f"{state.submission_id} was stopped")
    if state.status != "SUCCEEDED":
        code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
        said = (state.exit_code is not None and last_line) or state.cause or "no reason given"
        log = f"its log: raymodels logs {state.submission_id} {cluster.options}"
        raise JobError(f"{state.submission_id} failed{code}: {said} ({log})")
    return info


def as_state(info: JobDetails) -> JobState:
    return JobState(
        info.submission_id or info.job_id or "",
        info.status.value,
        info.entrypoint,
        (info.message or "").strip(),
        info.start_time / 1000 if info.start_time else None,
        info.end_time / 1000 if info.end_time else None,
        info.driver_exit_code,
    )
