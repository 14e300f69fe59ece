"""What this machine has, what is missing, and what to do about it. Imports nothing heavy, so it also tells
what to install where only the core is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from raymodels import niceness, storage
from raymodels.errors import StorageError

GIB = 1 << 30
PACKAGES = ("ray", "torch", "deepspeed", "transformers", "datasets", "safetensors")
DRIVERS = {"s3": "s3fs", "gs": "gcsfs"}


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``remedy`` is empty where ``ok``; without an ``optional`` one the rest still works."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False


def checks(place: str = "./runs") -> list[Check]:
    """Everything that training and serving need, with results kept in ``place``."""
    return [
        _python(),
        _compiler(),
        _ninja(),
        *(_package(name) for name in PACKAGES),
        _package("vllm", optional=True),
        _gpu(),
        _memory(),
        _room("disk", storage.local_path(place) if storage.is_local(place) else Path.cwd(), 10, "free some space"),
        _room("/dev/shm", Path("/dev/shm"), 2, "give the container more: docker run --shm-size=8g"),
        *(_driver(protocol, module) for protocol, module in DRIVERS.items()),
        _writable(place),
        _token(),
        _niceness(),
    ]


def _check(name: str, ok: bool, detail: str, remedy: str, optional: bool = False) -> Check:
    return Check(name, ok, detail, "" if ok else remedy, optional)


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    return _check("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")


def _compiler() -> Check:
    found = shutil.which(os.environ.get("CXX", "g++"))
    return _check("compiler", found is not None, found or "none", "DeepSpeed compiles its operators: install g++")


def _ninja() -> Check:
    beside_python = Path(sys.executable).with_name("ninja")
    found = shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)
    return _check("ninja", found is not None, found or "none", "pip install ninja, or 'raymodels[train]'")


def _package(name: str, optional: bool = False) -> Check:
    wanted, extra = _requirement(name)
    remedy = f"pip install 'raymodels[{extra}]'"
    installed = next((found for found in (name, f"{name}-cpu") if _version(found)), None)
    if installed is None:
        return Check(name, False, "not installed", remedy, optional)
    version = _version(installed) or ""
    fits = wanted.specifier.contains(version, prereleases=True)
    return _check(name, fits, version if fits else f"{version}, not {wanted.specifier}", remedy, optional)


def _requirement(name: str) -> tuple[Requirement, str]:
    """What this package's own metadata asks of another, and the extra that asks it."""
    for line in metadata.requires("raymodels") or []:
        requirement = Requirement(line)
        if requirement.name == name and requirement.marker:
            extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker))
            return requirement, extra.group(1) if extra else "train"
    raise AssertionError(f"no extra of raymodels asks for {name}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Check:
    torch = _version("torch") or ""
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", True, "none: CPU over gloo, precision fp32")
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        return Check("gpu", False, asked.stdout.strip() or asked.stderr.strip(), "repair the NVIDIA driver")
    found = "; ".join(asked.stdout.strip().splitlines())
    return _check(
        "gpu", not torch.endswith("+cpu"), f"{found}; torch {torch}", "pip install torch from PyPI, with CUDA"
    )


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return _check("memory", total >= 4 * GIB, f"{total / GIB:.1f} GiB", "4 GiB are needed for the smallest models")


def _room(name: str, path: Path, least_gib: int, remedy: str) -> Check:
    usage = shutil.disk_usage(_existing(path))
    detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    return _check(name, usage.free >= least_gib * GIB, detail, f"{least_gib} GiB are wanted: {remedy}")


def _driver(protocol: str, module: str) -> Check:
    found = util.find_spec(module) is not None
    remedy = f"pip install 'raymodels[{protocol}]'"
    return _check(f"{protocol}://", found, module if found else f"{module} not installed", remedy, optional=True)


def _writable(place: str) -> Check:
    remedy = "give this user the right to write there, or set run.storage"
    if storage.is_local(place):
        parent = _existing(storage.local_path(place))
        able = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        return _check("storage", able, f"{parent} can{'' if able else 'not'} be written", remedy)
    probe = storage.join(place, f".doctor-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    except (StorageError, OSError) as error:
        return Check("storage", False, f"{place}: {str(error).partition(chr(10))[0]}", remedy)
    return Check("storage", True, f"{place} can be written")


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _token() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    detail = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is unset: raymodels uses token"
    remedy = "anyone who reaches this Ray runs code on it: set RAY_AUTH_MODE=token"
    return _check("ray token", mode.lower() in ("", "token"), detail, remedy)


def _niceness(processes: Path = Path("/proc")) -> Check:
    """Whether a Ray that runs on this machine leaves its workers the priority that whoever is served waits for."""
    environments = []
    for name in processes.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if name.read_text().strip() == "raylet":
                environments.append(name.with_name("environ").read_text(errors="replace").split("\0"))
    wanted = f"{niceness.VARIABLE}={niceness.SERVER}"
    lowered = sum(wanted not in environment for environment in environments)
    if not environments:
        return Check("ray niceness", True, f"no Ray runs here: raymodels starts it with {wanted}", optional=True)
    detail = f"{lowered} of {len(environments)} Ray nodes here let other processes go before what they serve"
    return _check("ray niceness", not lowered, detail if lowered else wanted, niceness.REMEDY, optional=True)
