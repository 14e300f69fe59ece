"""Who gives way on a busy machine: what somebody waits for runs at the priority of a server, all else behind it.

Ray lowers its workers by 15, and a process without privileges cannot raise itself again: one that computes beside them
then has 28 times their share of a core. So wherever we start Ray, it is told to leave them as they are, and what nobody
waits for lowers itself.
"""

from __future__ import annotations

import os

VARIABLE = "RAY_worker_niceness"
"""Read by the raylet, from the environment in which Ray is started on a node."""
SERVER, BEHIND = 0, 15
"""BEHIND is Ray's own for all workers, so that training and batches weigh as much as ever against anything else."""
OVERRIDE = "RAYMODELS_NICENESS"
"""Of what nobody waits for, where that is not to be BEHIND: in tests, which run beside each other and wait for it."""
REMEDY = f"start Ray with {VARIABLE}={SERVER} in its environment, on every node"


def give_way() -> None:
    """Lower this thread, and the threads and processes that it starts from now on."""
    os.nice(max(0, int(os.environ.get(OVERRIDE, BEHIND)) - current()))


def current() -> int:
    """The niceness of this thread, from -20 to 19."""
    return os.getpriority(os.PRIO_PROCESS, 0)
