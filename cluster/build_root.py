"""Does the build steps of the Dockerfile beside it in empty folders, without a container engine, and runs the result.

    sudo python -m cluster.build_root build FOLDER --target cpu
    sudo python -m cluster.build_root run FOLDER bash -c "$(cat cluster/smoke.sh)"

`build` does each step of the target and of the stages that it needs: a stage is a folder; RUN is a shell chrooted into
it, in namespaces of its own for mounts and processes; COPY takes from the repository, without what the .dockerignore
leaves out, or from another stage. `run` runs a command as the image's user with the image's environment; what it writes
lies in memory and is gone when it ends.

What differs from an engine: there are no images without a registry, so debootstrap's Debian bookworm with its own
Python 3.11 (python3, python3-dev, python3-venv, python-is-python3) stands in for `python:3.11-slim-bookworm`; and the
network, /dev and /sys are the machine's. What a machine needs to reach its mirrors (pip's configuration, certificates,
folders of wheels) goes in by --bind: mounted read-only at the same path while steps run, of which an empty place stays.

Needs Linux, root, util-linux and debootstrap. Exits with 2 for bad input, else with the code of what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.dockerfile import BuildError, Stage, Step, expand, ignored, order, parse

DOCKERFILE = Path(__file__).resolve().with_name("Dockerfile")
IGNORE_FILE = DOCKERFILE.with_name("Dockerfile.dockerignore")
CONTEXT = DOCKERFILE.parents[1]
# What stands in for an image: a release of Debian, and the packages that bring what the image has.
STAND_INS = {
    "python:3.11-slim-bookworm": (
        "bookworm",
        "ca-certificates netbase tzdata python3 python3-dev python3-venv python-is-python3",
    )
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FROM_MACHINE = ("/etc/resolv.conf", "/etc/hosts")  # mounted by an engine too


@dataclass
class Image:
    """A stage as far as it is built."""

    root: str
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    workdir: str = "/"
    user: str = "0"


@dataclass(frozen=True)
class Builder:
    """What holds for every stage of one build: build arguments, and paths of the machine mounted for RUN."""

    folder: Path
    args: dict[str, str]
    binds: Sequence[str]

    def build(self, chain: Sequence[Stage]) -> Image:
        """The last stage of ``chain``, from nothing; the others' folders are removed when it is there."""
        images: dict[str, Image] = {}
        for stage in chain:
            if stage.base not in images:
                images[stage.base] = self.stand_in(stage.base)
            images[stage.name] = self.stage(stage, images)
        result = images.pop(chain[-1].name)
        for image in images.values():
            shutil.rmtree(image.root)
        return result

    def stand_in(self, name: str) -> Image:
        release, packages = STAND_INS[name]
        print(f"[{name}] debootstrap {release}, then {packages}", flush=True)
        image = Image(str(self.folder / "base"))
        subprocess.run(["debootstrap", "--variant=minbase", release, image.root], check=True)
        install = f"apt-get update && apt-get install --no-install-recommends -y {packages}"
        inside(image, ["/bin/sh", "-c", f"{install} && rm -rf /var/lib/apt/lists/*"], {}, self.binds)
        return image

    def stage(self, stage: Stage, images: dict[str, Image]) -> Image:
        base = images[stage.base]
        image = Image(str(self.folder / f"stage-{stage.name}"), dict(base.env), base.workdir, base.user)
        subprocess.run(["cp", "-a", "--reflink=auto", base.root, image.root], check=True)
        args: dict[str, str] = {}
        for number, step in enumerate(stage.steps, 1):
            start = time.monotonic()
            print(f"[{stage.name} {number}/{len(stage.steps)}] {step.name} {step.text}", flush=True)
            self.step(step, image, images, args)
            print(f"[{stage.name} {number}/{len(stage.steps)}] {time.monotonic() - start:.1f} s", flush=True)
        return image

    def step(self, step: Step, image: Image, images: dict[str, Image], args: dict[str, str]) -> None:
        values = args | image.env  # of an ARG and an ENV of one name, ENV counts
        if step.name == "RUN":
            inside(image, ["/bin/sh", "-c", step.text], args, self.binds)
        elif step.name == "COPY":
            copy(step, image, images[step.copied_stage] if step.copied_stage else None, values)
        elif step.name == "ENV":
            image.env |= dict(word.split("=", 1) for word in shlex.split(expand(step.text, values)))
        elif step.name == "ARG":
            [word] = shlex.split(expand(step.text, values))
            name, has_default, default = word.partition("=")
            if name in self.args or has_default:
                args[name] = self.args.get(name, default)
        elif step.name == "WORKDIR":
            image.workdir = posixpath.join(image.workdir, expand(step.text, values))
            below(image.root, image.workdir).mkdir(parents=True, exist_ok=True)
        elif step.name == "USER":
            image.user = expand(step.text, values)


def copy(step: Step, image: Image, other: Image | None, values: dict[str, str]) -> None:
    """A file goes into a folder or under a new name; of a folder, its content goes. All becomes root's."""
    *sources, place = expand(step.text.removeprefix(f"--from={step.copied_stage}"), values).split()
    target = below(image.root, posixpath.join(image.workdir, place))
    into = len(sources) > 1 or place.endswith("/") or target.is_dir()
    for name in sources:
        source = below(other.root if other else CONTEXT, name)
        paths = [source, *sorted(source.rglob("*"))]
        if not other:
            paths = in_context(paths)
        if not source.exists() or not paths:
            raise step.refused(f"{name} is not there, or left out by {IGNORE_FILE.name}")
        end = target / source.name if into and not source.is_dir() else target
        for path in paths:
            copied = end / path.relative_to(source)
            folder = path.is_dir() and not path.is_symlink()
            (copied if folder else copied.parent).mkdir(parents=True, exist_ok=True)
            if not folder:
                shutil.copy2(path, copied, follow_symlinks=False)


def in_context(paths: Sequence[Path]) -> list[Path]:
    """Those of the repository's paths that the .dockerignore lets a build see."""
    patterns = [line.strip() for line in IGNORE_FILE.read_text().splitlines()]
    patterns = [pattern for pattern in patterns if pattern and not pattern.startswith("#")]
    return [path for path in paths if not ignored(path.relative_to(CONTEXT).as_posix(), patterns)]


def below(root: str | Path, path: str) -> Path:
    return Path(root) / posixpath.normpath(f"/{path}").lstrip("/")


def inside(
    image: Image, command: Sequence[str], env: dict[str, str], binds: Sequence[str] = (), scratch: Path | None = None
) -> None:
    """Runs a command in an image as its user; with ``scratch``, an empty folder, on a layer in memory above it.

    Raises CalledProcessError where the command fails. Every mount ends with the command, however that ends.
    """
    root, mounts = Path(image.root), list[str]()
    if scratch:
        root = scratch / "root"
        layers = f"lowerdir={image.root},upperdir={scratch}/upper,workdir={scratch}/work"
        mounts.append(f"mount -t tmpfs tmpfs {quoted(scratch)}; cd {quoted(scratch)}; mkdir root upper work")
        mounts.append(f"mount -t overlay overlay -o {quoted(layers)} root")
    mounts.append(f"mount -t proc proc {quoted(root)}/proc; mount -o rbind,ro /sys {quoted(root)}/sys")
    mounts.append(f"mount --rbind /dev {quoted(root)}/dev; mount -t tmpfs tmpfs {quoted(root)}/dev/shm")
    for path in [*FROM_MACHINE, *binds]:
        place = quoted(below(root, path))
        make = f"mkdir -p {place}" if Path(path).is_dir() else f"mkdir -p $(dirname {place}); touch {place}"
        mounts.append(f"{make}; mount -o bind,ro {quoted(path)} {place}")
    variables = {"HOME": home(image), **env, **image.env}
    enter = ["chroot", f"--userspec={image.user}", str(root), "env", "-i", f"--chdir={image.workdir}"]
    enter += [*(f"{name}={value}" for name, value in variables.items()), *command]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    subprocess.run([*namespaces, "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh", *enter], check=True)


def quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def home(image: Image) -> str:
    users = [line.split(":") for line in below(image.root, "/etc/passwd").read_text().splitlines()]
    return next((user[5] for user in users if image.user in (user[0], user[2])), "/")


def ready(*tools: str) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise BuildError("this mounts and chroots: run it as root on Linux, or build the image with docker")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        raise BuildError(f"{missing[0]} is not installed: apt-get install {missing[0]}")


def build(folder: Path, target: str, build_args: Sequence[str], binds: Sequence[str]) -> None:
    chain = order(parse(DOCKERFILE.read_text(), STAND_INS), target)
    if plain := [word for word in build_args if "=" not in word]:
        raise BuildError(f"--build-arg {plain[0]}: write NAME=VALUE")
    args = dict(word.split("=", 1) for word in build_args)
    declared = {re.split(r"[= ]", step.text)[0] for stage in chain for step in stage.steps if step.name == "ARG"}
    if unknown := args.keys() - declared:
        raise BuildError(f"--build-arg {min(unknown)}: {target} declares no such ARG, only {sorted(declared)}")
    if missing := [path for path in binds if not Path(path).exists()]:
        raise BuildError(f"--bind {missing[0]}: there is no such path")
    ready("debootstrap")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BuildError(f"{folder} is not empty: name a new folder, or empty it")
    image = Builder(folder, args, binds).build(chain)
    (folder / "scratch").mkdir()
    (folder / "image.json").write_text(json.dumps(asdict(image), indent=2))
    print(f"{target} is in {image.root}", flush=True)


def run(folder: Path, command: Sequence[str]) -> None:
    ready()
    if not (folder / "image.json").exists():
        raise BuildError(f"{folder} holds no finished image: build one there first")
    inside(Image(**json.loads((folder / "image.json").read_text())), command, {}, scratch=folder / "scratch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.build_root", description="The image without a container engine.")
    commands = parser.add_subparsers(required=True, dest="does")
    builds = commands.add_parser("build", help="do a target's build steps from nothing")
    builds.add_argument("folder", type=Path, help="empty or new; 8 GB while it builds, 3 GB after")
    builds.add_argument("--target", default="cpu", help="a stage of the Dockerfile")
    builds.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="overrides an ARG")
    builds.add_argument("--bind", action="append", default=[], metavar="PATH", help="seen read-only by every RUN")
    runs = commands.add_parser("run", help="run a command in what was built")
    runs.add_argument("folder", type=Path)
    runs.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        if given.does == "build":
            build(given.folder.resolve(), given.target, given.build_arg, given.bind)
        else:
            run(given.folder.resolve(), given.command)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{shlex.join(map(str, error.cmd[-3:]))} failed with {error.returncode}", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
