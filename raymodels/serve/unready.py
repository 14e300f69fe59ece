"""Applications that do not run, and why: what deploying waits for, and what a running endpoint warns of."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray import serve

from raymodels.errors import ServeError
from raymodels.serve.capacity import cannot_start

log = logging.getLogger(__name__)

POLL_S = 0.25
MISSING, FAILED = "MISSING", "DEPLOY_FAILED"

Unready = dict[str, tuple[str, str]]
"""Of applications that are not running: status, and why."""


def wait_until_running(names: list[str], deadline: float, timeout_s: float) -> None:
    """Wait for applications.

    Args:
        deadline: in `time.monotonic`'s time.
        timeout_s: what the deadline was made of, for the message.

    Raises:
        ServeError: one cannot start, or the deadline has passed; says which and why.
    """
    while unready := unready_applications(names):
        for status, why in unready.values():
            if status == FAILED:
                raise ServeError(why)
        if time.monotonic() > deadline:
            waiting = "; ".join(why for _, why in unready.values())
            raise ServeError(f"not ready after start_timeout_s {timeout_s:g}: {waiting}")
        time.sleep(POLL_S)


def unready_applications(names: list[str]) -> Unready:
    """Those of the applications that do not run, as Serve says now."""
    applications, unready = serve.status().applications, {}
    for name in names:
        found = applications.get(name)
        if found is None:
            unready[name] = (MISSING, f"{name} is not deployed")
        elif found.status != "RUNNING":
            causes = [found.message, *(state.message for state in found.deployments.values())]
            why = f"{name}: {' '.join(cause.strip() for cause in causes if cause) or found.status}"
            unready[name] = (FAILED if _cannot_start(found) else str(found.status), why)
    return unready


def _cannot_start(found: Any) -> bool:
    """Whether Serve has given up on replicas of an application; one that autoscales is then just called unhealthy."""
    return found.status == FAILED or any(cannot_start(state) for state in found.deployments.values())


def log_changes(before: Unready, now: Unready) -> None:
    """Warn of what runs no more, and of what runs again."""
    for name, (status, why) in now.items():
        if before.get(name) != (status, why):
            log.warning("%s (Ray Serve goes on trying)", why)
    for name in before.keys() - now.keys():
        log.warning("%s: running again", name)
