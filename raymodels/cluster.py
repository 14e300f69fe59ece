"""Reach a Ray cluster, and know whether it can ever hold what is asked of it."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray

from raymodels import niceness
from raymodels.config import WorkersConfig
from raymodels.errors import ClusterError

POLL_SECONDS, FREEING_SECONDS = 1.0, 5.0
PROBES, PROBE_SECONDS, SETTLE_SECONDS = 64, 3.0, 40.0


def connect() -> bool:
    """Join the cluster that ``RAY_ADDRESS`` names or that runs on this host, or start a local one.

    A local one is started with token authentication, Ray's default there; for another set ``RAY_AUTH_MODE`` before
    Python starts: Ray reads it as it is imported.

    Returns:
        Whether this call connected; false where the process was connected already.

    Raises:
        ClusterError: the address does not answer, or refuses the token.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(niceness.VARIABLE, str(niceness.SERVER))
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "this host")
        raise ClusterError(f"cannot reach Ray at {address}: {error}; check RAY_ADDRESS and the token") from error
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has put its own there, which exits with 15
    return True


@contextmanager
def asking_for(workers: WorkersConfig) -> Iterator[None]:
    """While in here the cluster's autoscaler, if it has one, is asked for the nodes of all the workers."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"CPU": workers.cpus, "GPU": workers.gpus}] * workers.most)
    try:
        yield
    finally:
        if ray.is_initialized():  # else the cluster was lost, or left by Ctrl-C
            request_resources(bundles=[])


def wait_for_room(workers: WorkersConfig, notice: Callable[[str], None]) -> int:
    """Wait until the cluster's nodes could hold the least number of workers at once, also if others use them now.

    Nodes may still be joining, so this waits up to ``workers.start_timeout_s``, saying once what for.

    Returns:
        How many workers to start: as many as are free for, up to the most, but the least in any case.

    Raises:
        ClusterError: they did not come in time; says what is missing.
    """
    deadline, said = time.monotonic() + workers.start_timeout_s, False
    while (found := room(workers)) < workers.least:
        missing = (
            f"the cluster has room for {found} of {workers.least} workers of {workers.cpus:g} CPU and "
            f"{workers.gpus} GPU ({_inventory()})"
        )
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"{missing} after {workers.start_timeout_s:g} s: add nodes, or lower workers.count, cpus or gpus"
            )
        if not said:
            notice(f"{missing}; waiting up to {workers.start_timeout_s:g} s for more nodes")
            said = True
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    deadline = time.monotonic() + FREEING_SECONDS  # what ended just now is freed, and known to be, in a moment
    while (now := free(workers)) < min(workers.most, room(workers)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 20)
    return max(workers.least, min(workers.most, now))


def free(workers: WorkersConfig) -> int:
    """How many workers fit into what nobody uses."""
    available = ray._private.state.available_resources_per_node()
    return sum(_fits(available.get(node["NodeID"], {}), workers) for node in _staying())


def room(workers: WorkersConfig) -> int:
    """How many workers the cluster's nodes could hold if nothing else ran."""
    return sum(_fits(node["Resources"], workers) for node in _staying())


def _staying() -> list[dict[str, Any]]:
    """The nodes that take new work: those about to be preempted do not. Ray tells of them nowhere else."""
    leaving = ray._private.state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def alive_nodes() -> set[str]:
    """Ray's ids of the nodes that it believes to be alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def settled_nodes() -> set[str]:
    """`alive_nodes`, once Ray has noticed which of them do not answer any more; it may take it a while by itself."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(PROBES) as pool:
        silent = {node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if not answers}
    deadline = time.monotonic() + SETTLE_SECONDS
    while silent & alive_nodes() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return alive_nodes() - silent


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _fits(resources: dict[str, float], workers: WorkersConfig) -> int:
    by_cpu = math.floor(resources.get("CPU", 0) / workers.cpus)
    return min(by_cpu, math.floor(resources.get("GPU", 0) / workers.gpus)) if workers.gpus else by_cpu


def _inventory() -> str:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {kind: sum(node.get(kind, 0) for node in alive) for kind in ("CPU", "GPU")}
    return f"{len(alive)} nodes with {total['CPU']:g} CPU and {total['GPU']:g} GPU in all"
