"""The commands about clusters: `raymodels submit`, `status`, `logs`, `stop`, `list` for jobs, and `cluster check`.

Exit codes, beside those of every command: 0 the job succeeded, or runs and was not waited for; 1 it failed; 143 it was
stopped; 75 the cluster was lost while the job was followed, so that the job may still run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from raymodels.errors import ConfigError
from raymodels.submit import LOST_AFTER_S, Following, Job, JobState, Submission, connect
from raymodels.submit import job_state as find
from raymodels.submit import list_jobs as find_all
from raymodels.submit import logs as show_logs
from raymodels.submit import stop as stop_job
from raymodels.submit import submit as run

jobs = typer.Typer()
cluster = typer.Typer(help="Clusters of one's own, which `ray up` starts.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, https://HOST or http://HOST:8265; default RAY_API_SERVER_ADDRESS"),
]
Ca = Annotated[Path | None, typer.Option("--ca", envvar="RAYMODELS_CA", help="PEM file of the CA to trust for https")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As submit and list print it")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
LostAfter = Annotated[float, typer.Option(min=0, help="Seconds without an answer after which the cluster is lost")]


@jobs.command("submit")
def submit(
    config: Annotated[Path, typer.Argument(help="A YAML config, such as jobs/configs/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated")] = None,
    address: Address = None,
    ca: Ca = None,
    job: Annotated[Job, typer.Option(help="Which of jobs/ to run")] = "train",
    wait: Annotated[bool, typer.Option(help="Follow the log and exit with the job's result")] = True,
    id: Annotated[
        str | None, typer.Option(help="The job's name; default: derived from the command and the files sent")
    ] = None,
    again: Annotated[bool, typer.Option(help="Run it once more if it is over")] = False,
    working_dir: Annotated[Path, typer.Option(help="The folder to send, which holds jobs/")] = Path(),
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs for jobs/*.py itself, which then need not run on the head node")
    ] = None,
    entrypoint_num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs for it")] = None,
    entrypoint_memory: Annotated[int | None, typer.Option(min=0, help="Bytes of memory for it")] = None,
    entrypoint_resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=AMOUNT", help="A custom resource for it; may be repeated")
    ] = None,
    lock: Annotated[
        Path | None, typer.Option(help="Requirements to install on every node first; default: the image's packages")
    ] = None,
    lost_after: LostAfter = LOST_AFTER_S,
) -> None:
    """Run a job of this working tree on a Ray cluster; given again, attach to it.

    Ctrl-C leaves it running. Exits with 0 if it succeeded, 1 if it failed, 143 if it was stopped, and 75 if the
    cluster was lost.
    """
    asked = Submission(
        id=id,
        again=again,
        cpus=entrypoint_num_cpus,
        gpus=entrypoint_num_gpus,
        memory=entrypoint_memory,
        resources=_amounts(entrypoint_resource or []),
        lock=lock,
    )
    result = run(
        config,
        address=address,
        ca=ca,
        job=job,
        overrides=overrides or [],
        working_dir=working_dir,
        submission=asked,
        wait=wait,
        follow=_line,
        notice=_notice,
        lost_after_s=lost_after,
    )
    print(f"{result.submission_id}  {result.status}")


@jobs.command("status")
def status(job_id: JobId, address: Address = None, ca: Ca = None, as_json: AsJson = False) -> None:
    """What a job is doing, or how it ended; exits as submit does, with 0 while it runs."""
    state = find(connect(address, ca), job_id)
    _show(state, as_json)
    raise typer.Exit(_exit_code(state))


@jobs.command("logs")
def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; then exit as submit does")
    ] = False,
    address: Address = None,
    ca: Ca = None,
    lost_after: LostAfter = LOST_AFTER_S,
) -> None:
    """The log of a job."""
    show_logs(connect(address, ca), job_id, Following(_line, _notice, lost_after), to_the_end=follow)


@jobs.command("stop")
def stop(
    job_id: JobId,
    wait: Annotated[bool, typer.Option(help="Until it has committed its last step and left")] = True,
    address: Address = None,
    ca: Ca = None,
) -> None:
    """Ask a job to end; training commits its last step first. A job that is over is left as it is."""
    print(_text(stop_job(connect(address, ca), job_id, wait)))


@jobs.command("list")
def list_command(address: Address = None, ca: Ca = None, as_json: AsJson = False) -> None:
    """Every job that was submitted to a cluster, the newest first."""
    states = find_all(connect(address, ca))
    if as_json:
        print(json.dumps([_plain(state) for state in states], indent=2))
        return
    for state in states:
        print(_text(state))


def _amounts(given: list[str]) -> dict[str, float]:
    amounts = {}
    for text in given:
        name, _, amount = text.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            raise ConfigError(f"--entrypoint-resource {text}: give NAME=AMOUNT, such as head=0.001") from None
    return amounts


def _exit_code(state: JobState) -> int:
    return state.error.exit_code if state.error else 0


def _show(state: JobState, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(state), indent=2))
        return
    print(_text(state))
    if state.message:
        print(state.message if state.error else state.cause)


def _text(state: JobState) -> str:
    took = "-" if state.seconds is None else f"{state.seconds:.0f} s"
    return "\t".join([state.submission_id, state.status, _when(state.started) or "-", took, state.entrypoint])


def _plain(state: JobState) -> dict[str, Any]:
    return asdict(state) | {"started": _when(state.started), "ended": _when(state.ended), "seconds": state.seconds}


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _line(text: str) -> None:
    print(text, flush=True)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@cluster.command("check")
def check_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of Ray's cluster launcher")],
) -> None:
    """What is wrong with files for `ray up`, by Ray's own rules and by ours; exits with 1 if anything is."""
    from raymodels.cluster_files import check

    findings = [finding for file in files for finding in check(file)]
    for finding in findings:
        print(finding)
    if findings:
        raise typer.Exit(1)
    print(f"nothing wrong with {', '.join(map(str, files))}")
