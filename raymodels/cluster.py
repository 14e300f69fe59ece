"""Reach a Ray cluster, and know whether it can ever hold what is asked of it."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from raymodels.config import WorkersConfig
from raymodels.errors import ClusterError

POLL_SECONDS = 1.0
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
    try:
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "this host")
        raise ClusterError(f"cannot reach Ray at {address}: {error}; check RAY_ADDRESS and the token") from error
    return True


def wait_for_room(workers: WorkersConfig, notice: Callable[[str], None]) -> None:
    """Wait until the cluster's nodes could hold the least number of workers at once, also if others use them now.

    Nodes may still be joining, so this waits up to ``workers.start_timeout_s``, saying once what for.

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


def room(workers: WorkersConfig) -> int:
    """How many workers the cluster's nodes could hold if nothing else ran."""
    # Nodes that are about to be preempted take no new work. Ray tells of them nowhere else.
    leaving = ray._private.state.state.get_draining_nodes()
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return sum(_fits(node["Resources"], workers) for node in staying)


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
