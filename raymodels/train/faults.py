"""What ended an attempt: its class, one sentence of cause, one of remedy, and whether to try again.

When one rank fails the others fail too, for want of it, and any of them may be heard first. So every rank's error is
read by itself (`symptoms`), and the one that explains the others is taken. Where that is open, what nobody should try
again goes first: a bug is never retried because some other rank lost its connection over it.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from ray.train import ControllerError, PreemptionError, WorkerGroupError

from raymodels import storage
from raymodels.config import RetryConfig
from raymodels.errors import Diverged, RaymodelsError, StorageError, TrainingError
from raymodels.train.failure import Failure, Link, WorkerFailure, chain
from raymodels.train.symptoms import Kind, in_collective, is_full, kind_of, refuses

if TYPE_CHECKING:
    from raymodels.train.attempt import Evidence

# The first kind that some rank's error is a sign of is the cause.
PRECEDENCE: tuple[Kind, ...] = get_args(Kind)
GONE: set[Kind] = {"out_of_memory_host", "preemption", "lost_node", "worker_killed"}
OUTRANKED_BY_A_VERDICT: set[Kind] = {"hang", "worker_killed", "unknown", "waited", "lost_contact"}
MEANT: dict[Kind, Kind] = {"waited": "hang", "lost_contact": "worker_killed"}

RESUMES = "start the run again: it resumes from its last checkpoint"
REMEDIES: dict[Kind, str] = {
    "user_bug": f"Mend the code at that place, then {RESUMES}",
    "config": "Change what it names, then start the run again",
    "data": f"Restore that file, or delete the prepared dataset to have it prepared again; then {RESUMES}",
    "checkpoint": "Delete that checkpoint to resume from the one before it, or restore its files",
    "diverged": f"Lower train.lr, raise train.warmup_steps or set train.on_divergence, then {RESUMES}",
    "out_of_memory_device": "Lower train.micro_batch; else set train.activation_checkpointing, raise zero.stage, or "
    "set zero.offload_optimizer.device to cpu",
    "out_of_memory_host": "Lower train.micro_batch or set train.activation_checkpointing; else put fewer workers on a "
    "node, raise zero.stage, or turn offloading to the cpu off",
    "preemption": "None needed: the run goes on where there is room",
    "lost_node": "See what became of the node; the run needs workers.count of them, or an elastic range",
    "storage": f"See that the place can be reached and written, then {RESUMES}",
    "hang": "See that rank's stack in the log; a slow but healthy run needs a higher workers.collective_timeout_s",
    "worker_killed": "See the node's kernel log for its memory running out, and the worker's own log for a crash",
    "unknown": "See the full trace in the log",
}
FULL = f"Free space there, or lower checkpoint.keep; then {RESUMES}"
REFUSED = f"Give the run the right to read and write there, then {RESUMES}"

LONGEST = 300  # characters of an error's message in a sentence


@dataclass(frozen=True)
class Fault:
    """Why an attempt ended.

    Attributes:
        trace: everything known, for the run's log.
        error: what to raise if there is no retry: what a worker raised on purpose, as it was, or a `TrainingError`
            that says cause and remedy.
    """

    kind: Kind
    cause: str
    remedy: str
    retry: bool
    trace: str
    error: RaymodelsError

    def advised(self, advice: str) -> Fault:
        """The same fault with more to its remedy."""
        remedy = f"{self.remedy}; {advice}"
        return replace(self, remedy=remedy, error=TrainingError(f"{self.cause}. {remedy}."))


@dataclass(frozen=True)
class Sign:
    """One rank's error, read by itself. ``rank`` is None for what did not come from a rank."""

    kind: Kind
    rank: int | None
    node: str
    who: str
    link: Link
    links: tuple[Link, ...]
    time: float
    error: RaymodelsError | None


def classify(error: BaseException, evidence: Evidence, rules: RetryConfig, happened: Mapping[str, int]) -> Fault:
    """Tell what ended an attempt.

    Args:
        error: what `ray.train.torch.TorchTrainer.fit` raised, or what kept it from being called.
        evidence: what was seen from outside.
        happened: how many faults of each kind the run was restarted after since it last saved a checkpoint.
    """
    signs = [_settled(sign, evidence) for sign in _signs(error)]
    first = _root(signs)
    kind, cause, remedy = MEANT.get(first.kind, first.kind), _cause(first), _remedy(first)
    if evidence.verdict is not None and first.kind in OUTRANKED_BY_A_VERDICT:
        kind, cause, remedy = "hang", evidence.verdict.sentence, REMEDIES["hang"]
    elif first.kind == "lost_contact" and evidence.nodes_lost:
        kind, cause, remedy = "lost_node", f"{_nodes(evidence)} died; {cause}", REMEDIES["lost_node"]
    own = first.error if kind == first.kind else None
    return Fault(
        kind=kind,
        cause=cause,
        remedy=remedy,
        retry=_retry(kind, first, rules, happened.get(kind, 0)),
        trace=_trace(error, evidence),
        error=own or TrainingError(f"{cause}. {remedy}."),
    )


def write_log(place: str, number: int, fault: Fault) -> None:
    """Write all that is known of a failed attempt to ``log/attempt-N.txt`` in the run directory.

    If storage refuses that too, it goes to stderr instead.
    """
    text = f"{fault.kind}\ncause: {fault.cause}\nremedy: {fault.remedy}\nretry: {fault.retry}\n\n{fault.trace}"
    log = storage.join(place, "log", f"attempt-{number}.txt")
    try:
        storage.write_bytes(log, text.encode())
    except StorageError as error:
        print(f"{error}; what would stand there:\n{text}", file=sys.stderr)


def _signs(error: BaseException) -> list[Sign]:
    if isinstance(error, PreemptionError):
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        nodes = ", ".join(node[:12] for node in error.preemption_info.preempted_node_ids)
        return [_plain(error, None, f"the provider takes back node {nodes} with rank {ranks}", "preemption")]
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return [_of_rank(rank, failure) for rank, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ControllerError):
        return [_plain(_inner(error.controller_failure), None, "the run's controller")]
    return [_plain(_inner(error), None, "the driver")]


def _of_rank(rank: int, error: BaseException) -> Sign:
    if isinstance(error, WorkerFailure):
        return _told(error.failure)
    info, inner = str(error), _inner(error)
    node, host, pid = (_found(rf"{name}='?([\w.:-]+)", info) for name in ("node_id", "hostname", "pid"))
    who = f"rank {rank}" + (f" on {host} (node {node[:12]}, pid {pid})" if node else "")
    return _plain(inner, rank, who, "preemption" if getattr(inner, "preempted", False) else None, node)


def _inner(error: BaseException) -> BaseException:
    """What Ray Train's health check and a task of Ray's wrap."""
    for wrapped in ("health_check_failure", "cause"):
        found = getattr(error, wrapped, None)
        error = found if isinstance(found, BaseException) else error
    return error


def _told(failure: Failure) -> Sign:
    kind, link = kind_of(failure.links)
    at = f" at {failure.at}" if failure.at else ""
    who = f"rank {failure.rank} on {failure.host} (node {failure.node[:12]}, pid {failure.pid}){at}"
    return Sign(kind, failure.rank, failure.node, who, link, failure.links, failure.time, failure.error)


def _plain(error: BaseException, rank: int | None, who: str, kind: Kind | None = None, node: str = "") -> Sign:
    links = chain(error)
    found, link = kind_of(links)
    own = error if isinstance(error, RaymodelsError) else None
    return Sign(kind or found, rank, node, who, link, links, float("inf"), own)


def _settled(sign: Sign, evidence: Evidence) -> Sign:
    """The sign in the light of which nodes died: a killed worker on a dead node is a lost node."""
    if sign.kind == "worker_killed" and sign.node in evidence.nodes_lost:
        return Sign(**(vars(sign) | {"kind": "lost_node"}))
    return sign


def _root(signs: list[Sign]) -> Sign:
    if any(sign.kind in GONE for sign in signs):
        explained = [sign for sign in signs if not (sign.kind == "user_bug" and in_collective(sign.links))]
        signs = explained or signs
    return min(signs, key=lambda sign: (PRECEDENCE.index(sign.kind), sign.time, sign.rank or 0))


def _cause(sign: Sign) -> str:
    text = _shortened(sign.link.message)
    said = text or sign.link.name
    match sign.kind:
        case "user_bug" | "unknown":
            where = f" ({sign.link.where})" if sign.link.where else ""
            return f"{sign.who} raised {sign.link.name}{': ' if text else ''}{text}{where}"
        case "preemption":
            return sign.who if sign.rank is None else f"{sign.who} lost its node, which was taken back"
        case "lost_node" if sign.rank is not None and not said.startswith("CUDA"):
            return f"the node of {sign.who} died or is out of reach"
        case "worker_killed":
            return f"the process of {sign.who} died: it was killed, crashed, or ended itself"
        case "hang":
            return f"{sign.who} has not answered for too long: {said}"
        case "waited":
            return f"{sign.who} waited too long in a collective that another rank did not join: {said}"
        case "lost_contact":
            return f"{sign.who} lost contact with another rank, of which nothing is known: {said}"
        case "out_of_memory_device":
            return f"{sign.who} ran out of GPU memory: {said}"
        case "out_of_memory_host":
            return f"{sign.who} ran out of host memory: {said}"
        case _:
            return f"{said} ({sign.who})"


def _remedy(sign: Sign) -> str:
    if sign.kind == "storage" and (is_full(sign.links) or refuses(sign.links)):
        return FULL if is_full(sign.links) else REFUSED
    return REMEDIES[MEANT.get(sign.kind, sign.kind)]


def _retry(kind: Kind, sign: Sign, rules: RetryConfig, happened: int) -> bool:
    if kind == "diverged":
        return isinstance(sign.error, Diverged) and sign.error.back_to is not None
    if kind == "storage" and refuses(sign.links):
        return False
    setting = "out_of_memory" if kind.startswith("out_of_memory") else kind
    allowed = getattr(rules, setting) if setting in RetryConfig.model_fields else 0
    return allowed == "always" or happened < allowed


def _trace(error: BaseException, evidence: Evidence) -> str:
    parts = ["".join(traceback.format_exception(error))]
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        parts.append(f"rank {rank}:\n{failure}\n")
    if evidence.verdict is not None:
        parts.append(f"{evidence.verdict.sentence}\n{evidence.verdict.stack}\n")
        parts += [f"rank {rank} stood at {frame}\n" for rank, frame in evidence.verdict.others.items()]
    if evidence.nodes_lost:
        parts.append(f"{_nodes(evidence)} died\n")
    return "\n".join(parts)


def _nodes(evidence: Evidence) -> str:
    return f"node {', '.join(node[:12] for node in evidence.nodes_lost)}"


def _shortened(message: str) -> str:
    """Its first line that says something, empty if none does."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
