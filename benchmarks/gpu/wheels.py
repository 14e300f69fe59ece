"""What the parts need beside torch and transformers, as wheels in a folder: gathered here, installed where a card is.

``benchmarks/gpu/gather [FOLDER]`` gathers them for Linux on x86-64 and both Pythons, with the versions of
requirements.lock. DeepSpeed is built here, without compiled ops: those are compiled where they are used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".wheels"
DEEPSPEED = "deepspeed"
# DeepSpeed's own needs, the engine's grammars, and what runs its conformance suite.
PLAIN = ("einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "llguidance", "pytest", "iniconfig", "pluggy")
PYTHONS = ((3, 11), (3, 12))
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)
MOST_BYTES = 40 << 20


class Missing(Exception):
    """Something that the parts need is not here; says what, and the remedy."""


def gather(folder: Path) -> None:
    """Download and build all wheels into a folder, and check them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    lock = ROOT / "requirements.lock"
    for major, minor in PYTHONS:
        platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in GLIBCS] + ["--platform=manylinux2014_x86_64"]
        for_python = ["--only-binary=:all:", "--implementation=cp", f"--python-version={major}.{minor}", *platforms]
        _pip("download", "--no-deps", "--dest", str(folder), "--constraint", str(lock), *for_python, *PLAIN)
    os.environ["DS_BUILD_OPS"] = "0"
    pinned = f"{DEEPSPEED}=={version(DEEPSPEED)}"
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), pinned)
    for python in PYTHONS:
        if lacking := unfit(folder, python):
            raise Missing(f"no wheel for Python {python[0]}.{python[1]}: {', '.join(lacking)}")
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise Missing(f"the wheels have {size:,} bytes, over {MOST_BYTES:,}: gather fewer")


def unfit(folder: Path, python: tuple[int, int]) -> list[str]:
    """What of all needed has no wheel in the folder that this Python takes on Linux on x86-64, by the wheels' tags."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import parse_wheel_filename

    platforms = [f"manylinux_2_{glibc}_x86_64" for glibc in range(max(GLIBCS), 4, -1)] + ["manylinux2014_x86_64"]
    taken = {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}
    found = set()
    for wheel in folder.glob("*.whl"):
        name, _, _, tags = parse_wheel_filename(wheel.name)
        if tags & taken:
            found.add(str(name))
    return sorted({DEEPSPEED, *PLAIN} - found)


def install(folder: Path, site: Path) -> dict[str, str]:
    """Put what this Python lacks into a folder of its own, and make it importable here and in the processes to come.

    Returns:
        What came from the wheels, name -> version.

    Raises:
        Missing: a wheel is not there, or cannot be installed.
    """
    lacking = [name for name in (DEEPSPEED, *PLAIN) if not _installed(name)]
    if not lacking:
        return {}
    if absent := sorted(set(lacking) & set(unfit(folder, sys.version_info[:2]))):
        raise Missing(
            f"missing wheels in {folder}: {', '.join(absent)}; run benchmarks/gpu/gather where there is network"
        )
    where = ["--no-index", "--find-links", str(folder), "--target", str(site)]
    _pip("install", "--no-deps", "--no-compile", *where, *lacking)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    os.environ["PATH"] = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"  # ninja
    sys.path.insert(0, str(site))
    return {name: version(name) for name in lacking}


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _pip(command: str, *options: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Missing(f"pip {command}: {' '.join(lines)[-600:]}")


def main() -> int:
    folder = Path(sys.argv[1]).absolute() if sys.argv[1:] else FOLDER
    try:
        gather(folder)
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 1
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size:>10,}  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels):>10,}  bytes in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
