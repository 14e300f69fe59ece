"""Run a job on a Ray cluster from this working tree: pack it, submit it, follow its log, return its result.

    submit("jobs/configs/demo.yaml", address="http://127.0.0.1:8265", overrides=["train.steps=50"])

The cluster's token is found where Ray itself looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymodels import storage
from raymodels.config import ServeConfig, load
from raymodels.errors import ClusterError, ConfigError, JobError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Job = Literal["train", "serve", "evaluate", "prepare"]

ADDRESS = "http://127.0.0.1:8265"
POLL_S = 1.0
LOST_AFTER_S = 60.0
EXCLUDES = [
    ".git",
    ".venv",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    "/runs",
    "/registry",
    "/prepared",
    "/exports",
    "/benchmarks/results",
]


@dataclass(frozen=True)
class JobResult:
    """A job as last seen. ``status`` is SUCCEEDED, or PENDING where it was not waited for."""

    submission_id: str
    status: str
    seconds: float
    address: str


def submit(
    config_path: str | Path,
    *,
    address: str | None = None,
    job: Job = "train",
    overrides: Sequence[str] = (),
    working_dir: str | Path = ".",
    wait: bool = True,
    follow: Callable[[str], object] = print,
) -> JobResult:
    """Run ``jobs/<job>.py`` with a config on a cluster.

    Args:
        config_path: lies inside ``working_dir``; it is checked here before anything is sent.
        address: of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's port 8265.
        overrides: ``section.key=value`` each.
        working_dir: what is sent, without histories, environments, caches and results.
        wait: follow the job to its end; otherwise return once it is accepted.
        follow: called with each line of the job's log, and with what one should know before it.

    Raises:
        ConfigError: the config is wrong, or lies outside ``working_dir``.
        ClusterError: the cluster is not there, refuses the token or the job, or is lost on the way.
        JobError: the job failed or was stopped.
    """
    started = time.monotonic()
    entrypoint = _entrypoint(Path(config_path), Path(working_dir), job, overrides, follow)
    place = _address(address)
    client = _connect(place)
    with _cluster_errors(place):
        job_id = client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": str(working_dir), "excludes": EXCLUDES}
        )
    follow(f"{job_id}: {entrypoint}")
    if not wait:
        return JobResult(job_id, "PENDING", time.monotonic() - started, place)
    try:
        info, last_line = _until_done(client, job_id, place, follow)
    except KeyboardInterrupt:
        follow(f"{job_id} goes on without you; stop it with: ray job stop --address {place} {job_id}")
        raise
    if info.status.value != "SUCCEEDED":
        raise JobError(_reason(info, job_id, place, last_line))
    return JobResult(job_id, info.status.value, time.monotonic() - started, place)


def _entrypoint(
    path: Path, working_dir: Path, job: Job, overrides: Sequence[str], follow: Callable[[str], object]
) -> str:
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
            follow(f"note: {setting} {value} is relative, so it means the job's own folder, gone with the cluster")
    arguments = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", script, inside.as_posix(), *arguments])


def _places(path: Path, job: Job, overrides: list[str]) -> dict[str, str]:
    """Check the config; the settings that say where results go or come from."""
    if job == "serve":
        return {"registry": load(path, overrides, ServeConfig).registry}
    config = load(path, overrides)
    places = {"run.storage": config.run.storage, "data.prepared": config.data.prepared}
    return {**places, "registry": config.registry} if config.publish else places


def _address(given: str | None) -> str:
    """An HTTP address. Ray's own client lets the environment override what it is given, so a conflict is an error."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if environment := os.environ.get(variable):
            if given is not None and given != environment:
                raise ConfigError(f"address {given} is overridden by {variable}={environment}: unset one of them")
            return environment
    address = given or ADDRESS
    return address if "://" in address else f"http://{address}"


def _token() -> str | None:
    """The cluster's token, from where Ray looks for it; none if there is none or authentication is off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ClusterError(f"cannot read the token at RAY_AUTH_TOKEN_PATH: {error}") from error
        return None


def _connect(address: str) -> JobSubmissionClient:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ClusterError(f"submitting needs Ray: pip install 'raymodels[train]' ({error})") from error
    token = _token()
    # Given as a header, the token is this call's: Ray's own loader reads it once per process.
    with _cluster_errors(address):
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)


@contextlib.contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """Ray's and requests' errors as one that says what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} refused the token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's "
            "(on its head node: ray get-auth-token)"
        ) from error
    except OSError as error:  # ConnectionError, and the base of all errors of requests
        raise ClusterError(
            f"no Ray cluster answers at {address}: is it running, and is its dashboard port (8265) forwarded here?"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"the cluster at {address} did not take the request: {_first_line(error)}") from error


def _until_done(
    client: JobSubmissionClient, job_id: str, address: str, follow: Callable[[str], object]
) -> tuple[JobDetails, str]:
    """Show the log as it grows until the job's status is terminal; the final status and the last line shown."""
    over = threading.Event()
    lines = _Lines(follow)
    with ThreadPoolExecutor(1) as pool:
        tail = pool.submit(asyncio.run, _tail(client, job_id, lines.arriving, over))
        try:
            info = _poll(client, job_id, address, lines, tail)
        finally:
            over.set()
        tail.result()
    with _cluster_errors(address):
        whole = client.get_job_logs(job_id)
    lines.finish(whole)
    return info, lines.last


def _poll(client: JobSubmissionClient, job_id: str, address: str, lines: _Lines, tail: Future[None]) -> JobDetails:
    """Show lines until the job's status is terminal. The end of the log's stream would prove nothing."""
    seen_at = time.monotonic()
    while True:
        lines.show(for_s=POLL_S)
        if tail.done():
            tail.result()
        try:
            info = client.get_job_info(job_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - seen_at > LOST_AFTER_S:
                raise ClusterError(
                    f"the cluster at {address} no longer answers; {job_id} may still run: "
                    f"ray job status --address {address} {job_id}"
                ) from error
            continue
        seen_at = time.monotonic()
        if info.status.is_terminal():
            return info


class _Lines:
    """A job's log, each line shown once however often its stream begins anew."""

    def __init__(self, follow: Callable[[str], object]) -> None:
        self.last = ""
        self.arriving: queue.Queue[tuple[int, str]] = queue.Queue()  # text with its offset in the log
        self._follow = follow
        self._shown = 0
        self._rest = ""

    def show(self, for_s: float) -> None:
        """Show what arrives in the next seconds."""
        until = time.monotonic() + for_s
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._add(*self.arriving.get(timeout=left))

    def finish(self, whole: str) -> None:
        """Show what the stream did not bring, and the last line even if it does not end."""
        self._add(0, whole)
        if self._rest:
            self._add(self._shown, "\n")

    def _add(self, offset: int, text: str) -> None:
        new = text[max(0, self._shown - offset) :]
        self._shown += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self.last = line.strip() or self.last
            self._follow(line)


async def _tail(
    client: JobSubmissionClient, job_id: str, arriving: queue.Queue[tuple[int, str]], over: threading.Event
) -> None:
    """Pass the log's text on until it is over, from its start again whenever the stream ends."""
    while not over.is_set():
        reading = asyncio.ensure_future(_read(client, job_id, arriving))
        while not (over.is_set() or reading.done()):
            await asyncio.wait([reading], timeout=POLL_S / 4)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await asyncio.sleep(0 if over.is_set() else POLL_S)


async def _read(client: JobSubmissionClient, job_id: str, arriving: queue.Queue[tuple[int, str]]) -> None:
    import aiohttp

    offset = 0
    # What breaks the stream shows in the job's status, which is polled, or is gone when it is opened again.
    with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError):
        async for text in client.tail_job_logs(job_id):
            arriving.put((offset, text))
            offset += len(text)


def _reason(info: JobDetails, job_id: str, address: str, last_line: str) -> str:
    if info.status.value == "STOPPED":
        return f"{job_id} was stopped"
    code = f" with exit code {info.driver_exit_code}" if info.driver_exit_code is not None else ""
    said = last_line or _first_line(info.message or "no reason given")
    return f"{job_id} failed{code}: {said} (its log: ray job logs --address {address} {job_id})"


def _first_line(value: Any) -> str:
    return str(value).strip().partition("\n")[0]
