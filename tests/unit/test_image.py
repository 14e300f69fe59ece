"""The image: its Dockerfile linted, and read as the script reads it that does the build steps without an engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import build_root
from cluster.build_root import CONTEXT, DOCKERFILE, STAND_INS, Builder, Image
from cluster.dockerfile import BuildError, Step, expand, ignored, order, parse
from raymodels.doctor import DRIVERS

STAGES = parse(DOCKERFILE.read_text(), STAND_INS)
SMALL = """
# a comment
FROM image AS first
RUN one \\
    # a comment in a continued line
    && two

FROM image AS unused
FROM first as last
COPY --from=first /a /b
"""


def test_the_dockerfile_has_nothing_that_hadolint_finds() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install 'raymodels[dev]'"
    command = [hadolint, "--no-color", "--format", "json", str(DOCKERFILE)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(answer.stdout) == [] and answer.returncode == 0


def test_hadolint_does_find_things(tmp_path: Path) -> None:
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("--no-cache-dir ", "", 1))
    answer = subprocess.run([hadolint, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert "DL3042" in answer.stdout and answer.returncode == 1


def test_instructions_are_joined_and_keep_their_line() -> None:
    stages = parse(SMALL, ["image"])
    assert list(stages) == ["first", "unused", "last"]
    [run] = stages["first"].steps
    assert (run.line, run.name, run.text.split()) == (4, "RUN", ["one", "&&", "two"])
    assert stages["last"].base == "first"
    assert stages["last"].steps[0].copied_stage == "first"


def test_a_target_is_built_from_what_it_needs_only() -> None:
    assert [stage.name for stage in order(parse(SMALL, ["image"]), "last")] == ["first", "last"]
    assert [stage.name for stage in order(STAGES, "cpu")] == ["system", "packages-cpu", "cpu"]
    assert [stage.name for stage in order(STAGES, "cuda")] == ["system", "system-cuda", "packages-cuda", "cuda"]
    with pytest.raises(BuildError, match="--target gpu: no such stage; there are system, "):
        order(STAGES, "gpu")


@pytest.mark.parametrize(
    "text, message",
    [
        ("FROM image", ":1: FROM image: a stage needs a name"),
        ("FROM other AS a", "other is neither an earlier stage nor one of image"),
        ("FROM image AS a\nFROM c AS b\nFROM image AS c", ":2: FROM c AS b: c is neither"),
        ("ARG A=1\nFROM image AS a", "nothing may stand before the first FROM"),
        ("FROM image AS a\nCOPY --from=a /x /x", ":2: COPY --from=a /x /x: a is no earlier stage"),
        ("FROM image AS a\nCOPY --from=b /x /x", ":2: COPY --from=b /x /x: b is no earlier stage"),
        ("FROM image AS a\nCOPY --chown=1 x y", "COPY is understood with --from and plain paths"),
        ("FROM image AS a\nCOPY *.py y", "COPY is understood with --from and plain paths"),
        ("FROM image AS a\nRUN --mount=type=cache x", "RUN is understood as a shell's command"),
        ("FROM image AS a\nRUN <<EOF\nx\nEOF", "RUN is understood as a shell's command"),
        ("FROM image AS a\nHEALTHCHECK NONE", "only FROM, ARG, ENV, RUN, COPY, WORKDIR, USER are understood"),
        ("FROM image AS a\nENV A 1", "write ENV NAME=VALUE"),
        ("FROM image AS a\nARG A=1 B=2", "write ARG NAME"),
        ("FROM image AS a\nRUN x \\\n", "Dockerfile:2: the last line is continued by nothing"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        parse(text, ["image"])


def test_names_are_replaced_as_in_a_dockerfile() -> None:
    values = {"A": "1", "PATH": "/bin"}
    assert expand("/opt:$PATH ${A}2 $NONE.", values) == "/opt:/bin 12 ."
    with pytest.raises(BuildError, match=r"\$\{A:-1\}: write \$\{NAME\}"):
        expand("${A:-1}", values)


@pytest.mark.parametrize(
    "path, out",
    [
        ("raymodels", False),
        ("raymodels/train/loop.py", False),
        ("raymodels/train/__pycache__", True),
        ("raymodels/train/__pycache__/loop.pyc", True),
        ("README.md", False),
        ("docs/README.md", True),
        (".git/config", True),
        (".venv", True),
        ("tests/unit/test_image.py", True),
    ],
)
def test_what_the_dockerignore_leaves_out(path: str, out: bool) -> None:
    assert ignored(path, build_root.IGNORE_FILE.read_text().split()) == out


def test_patterns_of_a_dockerignore() -> None:
    assert ignored("a/b/c.txt", ["**/*.txt"]) and ignored("c.txt", ["**/*.txt"])
    assert not ignored("a/c.txt", ["*.txt"])
    assert ignored("a/c.txt", ["a/?.txt"]) and not ignored("a/cc.txt", ["a/?.txt"])
    assert not ignored("a/c.txt", ["a", "!a/c.txt"]) and ignored("a/c.txt", ["!a/c.txt", "a"])


def image(tmp_path: Path) -> Image:
    (tmp_path / "root").mkdir(exist_ok=True)
    return Image(str(tmp_path / "root"))


def test_settings_of_a_stage_are_followed(tmp_path: Path) -> None:
    built, args = image(tmp_path), dict[str, str]()
    builder = Builder(tmp_path, {"B": "given", "C": "given", "D": ""}, [])
    steps = [
        ("ARG", "A=default"),
        ("ARG", "B=default"),
        ("ARG", "C"),
        ("ARG", "D=default"),
        ("ARG", "NONE"),
        ("ENV", "X=${A}-$B Y='two words' PATH=/opt/bin:$PATH"),
        ("WORKDIR", "/app"),
        ("WORKDIR", "below"),
        ("USER", "1000"),
    ]
    for line, (name, text) in enumerate(steps):
        builder.step(Step(line, name, text), built, {}, args)
    assert args == {"A": "default", "B": "given", "C": "given", "D": ""}
    assert built.env == {"X": "default-given", "Y": "two words", "PATH": f"/opt/bin:{build_root.PATH}"}
    assert (built.workdir, built.user) == ("/app/below", "1000")
    assert (tmp_path / "root/app/below").is_dir()


def test_copies_land_where_an_engine_puts_them(tmp_path: Path) -> None:
    built, other = image(tmp_path), Image(str(tmp_path / "other"))
    (tmp_path / "other/opt/venv/bin").mkdir(parents=True)
    (tmp_path / "other/opt/venv/bin/python").symlink_to("/usr/bin/python3")
    built.workdir = "/app"
    build_root.copy(Step(1, "COPY", "pyproject.toml README.md ./"), built, None, {})
    build_root.copy(Step(2, "COPY", "raymodels raymodels"), built, None, {})
    build_root.copy(Step(3, "COPY", "LICENSE /tmp/licence"), built, None, {})
    build_root.copy(Step(4, "COPY", "--from=other /opt/venv /opt/venv"), built, other, {})
    root = tmp_path / "root"
    assert (root / "app/pyproject.toml").read_bytes() == (CONTEXT / "pyproject.toml").read_bytes()
    assert (root / "app/raymodels/train/loop.py").is_file() and (root / "tmp/licence").is_file()
    assert not list(root.rglob("__pycache__"))
    assert str((root / "opt/venv/bin/python").readlink()) == "/usr/bin/python3"
    for name in ["tests", "nothing", ".git/config"]:
        with pytest.raises(BuildError, match=f"Dockerfile:5: COPY {name} .*: {name} is not there, or left out by"):
            build_root.copy(Step(5, "COPY", f"{name} /x"), built, None, {})


def test_bad_input_is_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="--build-arg X: cpu declares no such ARG, only "):
        build_root.build(tmp_path, "cpu", ["X=1"], [])
    with pytest.raises(BuildError, match="--build-arg X: write NAME=VALUE"):
        build_root.build(tmp_path, "cpu", ["X"], [])
    with pytest.raises(BuildError, match="--bind /no/such: there is no such path"):
        build_root.build(tmp_path, "cpu", [], ["/no/such"])


def test_without_root_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuildError, match="run it as root on Linux, or build the image with docker"):
        build_root.build(tmp_path / "new", "cpu", [], [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_keeps_nothing_of_building_the_package(target: str) -> None:
    [install] = [step.text for step in STAGES[target].steps if step.name == "RUN"]
    assert install.endswith("pip install --no-cache-dir --no-deps . && rm -rf build raymodels.egg-info")


def test_the_image_reaches_every_kind_of_bucket() -> None:
    names = {line.partition("==")[0] for line in (CONTEXT / "requirements.lock").read_text().splitlines()}
    assert names >= set(DRIVERS.values())
