"""What the planner says by itself: before a run starts, and after its memory has run out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymodels.config import Config
from raymodels.train.planner.change import with_settings
from raymodels.train.planner.options import Subject, own_way
from raymodels.train.planner.plan import gigabytes, plan

LESS = 0.75  # what to come down to where a config has run out of memory: the estimate is right within 15 %


def preflight(config: Config, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Before a run: refuse what cannot fit in any case, and say what may not fit. Never refuse what could have worked.

    The memory of a worker is ``workers.device_memory``. Where that is not set, CPU workers of a Ray on this host alone
    share the host's; otherwise it is not known, and nothing is said.

    Raises:
        ConfigError: the model states alone, on the most workers, are more than the memory.
    """
    known = config.workers.device_memory or _share_of_this_host(config)
    if known is None:
        return
    most = with_settings(config, workers=config.workers.most)
    if Subject(most, known).option(most, *own_way(config)).states > known:
        plan(most, known).must_fit()
    planned = plan(config, known)
    if planned.chosen.fits is False and on_event:
        on_event({"kind": "notice", "text": f"this may run out of memory: {planned.shortage()}"})


def relief(config: Config) -> str:
    """After memory has run out all the same: the planner's estimate, and the cheapest settings that take less."""
    planned = plan(config)
    held = planned.chosen.memory
    estimate = (
        f"the planner's estimate for {planned.chosen.name} on {planned.workers} workers is "
        f"{gigabytes(planned.chosen.needed)} a worker, {gigabytes(held.states)} of it model states"
    )
    change = plan(config, LESS * planned.chosen.needed).change
    return f"{estimate}; {1 - LESS:.0%} less with {change}" if change else estimate


def _share_of_this_host(config: Config) -> float | None:
    """A CPU worker's share of this host's memory and swap, where Ray runs nowhere else."""
    import ray

    if config.workers.gpus or os.environ.get("RAY_ADDRESS") or (ray.is_initialized() and len(ray.nodes()) > 1):
        return None
    memory = _host_memory()
    return memory and memory / config.workers.least


def _host_memory() -> int | None:
    """Bytes of memory and swap that this process may use; none where the system does not say it as Linux does."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    swap = kibibytes["SwapTotal"] * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    allowed = limit.read_text().strip() if limit.exists() else "max"
    memory = kibibytes["MemTotal"] * 1024
    return swap + (memory if allowed == "max" else min(memory, int(allowed)))
