"""What one exception is a sign of: the table from classes, error numbers and texts to kinds of fault. Pure.

Names of classes stand for the classes, so that this needs none of torch, Ray and the storage drivers. Texts are matched
where a library has no class for the matter; each is as torch 2.13, NCCL, DeepSpeed 0.19 and Ray 2.60 write it.
"""

from __future__ import annotations

import errno
import re
from typing import Literal

from raymodels.train.failure import Link

# Those that explain the others come first.
Kind = Literal[
    "user_bug",
    "config",
    "data",
    "checkpoint",
    "diverged",
    "out_of_memory_device",
    "out_of_memory_host",
    "preemption",
    "lost_node",
    "storage",
    "hang",
    "worker_killed",
    "unknown",
    # Only what other ranks' faults look like from here; never a verdict.
    "waited",
    "lost_contact",
]

# The nearest base of an exception that stands here decides.
KINDS: dict[str, Kind] = {
    "raymodels.errors.Diverged": "diverged",
    "raymodels.errors.DataError": "data",
    "raymodels.errors.StorageError": "storage",
    "raymodels.errors.CheckpointError": "checkpoint",
    "raymodels.errors.IntegrityError": "checkpoint",
    "raymodels.errors.RaymodelsError": "config",
    "torch.OutOfMemoryError": "out_of_memory_device",
    "torch.distributed.DistError": "lost_contact",
    "builtins.MemoryError": "out_of_memory_host",
    "ray.exceptions.OutOfMemoryError": "out_of_memory_host",
    "ray.exceptions.ActorUnavailableError": "lost_node",
    "ray.exceptions.NodeDiedError": "lost_node",
    "ray.exceptions.LocalRayletDiedError": "lost_node",
    "ray.exceptions.RayActorError": "worker_killed",
    "ray.exceptions.WorkerCrashedError": "worker_killed",
    "ray.exceptions.ObjectStoreFullError": "storage",
    "ray.exceptions.OutOfDiskError": "storage",
    "ray.exceptions.RuntimeEnvSetupError": "config",
    "ray.exceptions.AuthenticationError": "config",
    "ray.exceptions.RayTaskError": "user_bug",
    "ray.exceptions.RayError": "unknown",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckTimeoutError": "hang",
    "ray.train.v2._internal.exceptions.CollectiveTimeoutError": "waited",
    "ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError": "lost_node",
    "ray.train.v2._internal.exceptions.WorkerGroupStartupFailedError": "lost_node",
    "ray.train.v2._internal.exceptions.InsufficientClusterResourcesError": "config",
    "ray.train.v2._internal.exceptions.RayTrainError": "unknown",
}

# What libraries raise as a RuntimeError, or die of, and say in words only; the first that fits decides.
TEXTS: list[tuple[str, Kind]] = [
    (r"(CUDA|HIP)( error:)? out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", "out_of_memory_device"),
    (r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc", "out_of_memory_host"),
    (r"loss scale already at minimum", "diverged"),
    (r"uncorrectable (NVLink|ECC) error|CUDA error: .*(ECC|device\(s\) is/are busy|unknown error)", "lost_node"),
    (r"ncclInvalid(Usage|Argument)", "user_bug"),
    (r"gloo.*Timed out waiting|collective operation timeout|NCCL watchdog", "waited"),
    (r"[Gg]loo.*(Connection (reset|closed)|Broken pipe|connect|Socket closed)", "lost_contact"),
    (r"ncclRemoteError|ncclSystemError|NCCL communicator was aborted|remote process exited", "lost_contact"),
    (r"TCPStore|(recv|send)Value failed", "lost_contact"),
    (r"The actor died because its node has died", "lost_node"),
]
# A class that is right only where no text says otherwise.
VAGUE = {None, "worker_killed", "lost_contact"}
RAY_ACTOR = "ray.exceptions.RayActorError"
COLLECTIVES = "torch.distributed.distributed_c10d"

# What storage and networks answer with. Access that is refused is refused again.
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT}
STORAGE = REFUSED | FULL
STORAGE |= {errno.EIO, errno.ESTALE, errno.ENXIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNREFUSED}
STORAGE |= {errno.ECONNRESET, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH}


def kind_of(links: tuple[Link, ...]) -> tuple[Kind, Link]:
    """What a chain of exceptions is a sign of, and the one that says so; a bug where nothing else is known.

    Causes count. An error that was merely being handled when another was raised does not, as the other is the fault,
    unless ranks had lost contact: then whatever broke after it broke for that.
    """
    told = [(_kind(link), link) for link in links]
    for kind, link in told:
        if kind in ("lost_contact", "waited"):
            return kind, link
    for kind, link in told:
        if kind is not None and not link.handled:
            return kind, link
    return "user_bug", links[0]


def in_collective(links: tuple[Link, ...]) -> bool:
    """Whether it came out of torch's collectives, which break in many words when a rank is gone."""
    return any("builtins.RuntimeError" in link.kinds and COLLECTIVES in link.modules for link in links)


def refuses(links: tuple[Link, ...]) -> bool:
    """Whether storage said no, rather than failed."""
    return any(link.errno in REFUSED for link in links)


def is_full(links: tuple[Link, ...]) -> bool:
    return any(link.errno in FULL for link in links)


def _kind(link: Link) -> Kind | None:
    """None for an exception that tells nothing by itself."""
    named = next((KINDS[name] for name in link.kinds if name in KINDS), None)
    if named == "checkpoint" and any(module.startswith("raymodels.data") for module in link.modules):
        return "data"
    if named in VAGUE and _speaks(link):
        return next((kind for pattern, kind in TEXTS if re.search(pattern, link.message, re.DOTALL)), named)
    if named is None and link.errno == errno.ENOMEM:
        return "out_of_memory_host"
    if named is None and link.errno in STORAGE:
        return "storage"
    return named


def _speaks(link: Link) -> bool:
    """Whether its text is a library's, as far as the class tells."""
    return link.kinds[0] == "builtins.Exception" or bool({"builtins.RuntimeError", RAY_ACTOR} & set(link.kinds))
