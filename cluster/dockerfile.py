"""A Dockerfile as data: its stages, in the order in which a target needs them, and what a .dockerignore leaves out.

Only what the Dockerfile beside this file uses is understood, as Docker's reference defines it
(https://docs.docker.com/reference/dockerfile/); anything else is an error with its line. Reads no file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

INSTRUCTIONS = ("FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER")


class BuildError(Exception):
    """What is wrong and what to do about it."""


@dataclass(frozen=True)
class Step:
    """One instruction: the line it starts on, its name in capitals, and all that follows, continued lines joined."""

    line: int
    name: str
    text: str

    def refused(self, reason: str) -> BuildError:
        return BuildError(f"Dockerfile:{self.line}: {self.name} {self.text}: {reason}")

    @property
    def copied_stage(self) -> str | None:
        """The stage that a COPY takes from, if it takes from one."""
        match = re.match(r"--from=(\S+)", self.text) if self.name == "COPY" else None
        return match[1] if match else None


@dataclass(frozen=True)
class Stage:
    """What one FROM begins; ``base`` is an earlier stage's name or an image."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


def parse(text: str, images: Collection[str]) -> dict[str, Stage]:
    """The stages by name, in the file's order; each starts from an earlier one or from one of ``images``."""
    stages: dict[str, Stage] = {}
    for step in _steps(text):
        if step.name == "FROM":
            words = step.text.split()
            if len(words) != 3 or words[1].upper() != "AS":
                raise step.refused("a stage needs a name: FROM image AS name")
            if words[0] not in [*stages, *images]:
                raise step.refused(f"{words[0]} is neither an earlier stage nor one of {', '.join(images)}")
            stages[words[2]] = Stage(words[2], words[0])
            continue
        if not stages:
            raise step.refused("nothing may stand before the first FROM")
        if step.copied_stage and step.copied_stage not in list(stages)[:-1]:
            raise step.refused(f"{step.copied_stage} is no earlier stage")
        next(reversed(stages.values())).steps.append(step)
    return stages


def order(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The target and the stages that it needs, each behind those that it needs itself."""
    if target not in stages:
        raise BuildError(f"--target {target}: no such stage; there are {', '.join(stages)}")
    stage = stages[target]
    found: dict[str, Stage] = {}
    for name in [stage.base, *(step.copied_stage for step in stage.steps)]:
        if name in stages:
            found |= {needed.name: needed for needed in order(stages, name)}
    return [*found.values(), stage]


def expand(text: str, values: dict[str, str]) -> str:
    """$NAME and ${NAME} replaced; a name without a value is empty."""
    if "${" in re.sub(r"\$\{\w+\}", "", text):
        raise BuildError(f"{text}: write ${{NAME}}; of ${{...}} nothing else is understood")
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: values.get(match[1] or match[2], ""), text)


def ignored(path: str, patterns: Iterable[str]) -> bool:
    """Whether a .dockerignore leaves a path of the context out: its last pattern for the path or a parent decides."""
    parts = path.split("/")
    names = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    out = False
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!"))
        if any(expression.fullmatch(name) for name in names):
            out = not pattern.startswith("!")
    return out


def _steps(text: str) -> list[Step]:
    found: list[Step] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if pending else number
        pending += line.rstrip()
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        name, _, rest = pending.strip().partition(" ")
        found.append(_understood(Step(start, name.upper(), rest.strip())))
        pending = ""
    if pending:
        raise BuildError(f"Dockerfile:{start}: the last line is continued by nothing")
    return found


def _understood(step: Step) -> Step:
    if step.name not in INSTRUCTIONS:
        raise step.refused(f"only {', '.join(INSTRUCTIONS)} are understood")
    if step.name == "RUN" and (step.text.startswith(("-", "[")) or "<<" in step.text):
        raise step.refused("RUN is understood as a shell's command, without flags and here-documents")
    if step.name == "COPY" and re.search(r"--(?!from=)|[*?\[\"]", step.text):
        raise step.refused("COPY is understood with --from and plain paths")
    if step.name == "ENV" and not all("=" in word for word in shlex.split(step.text)):
        raise step.refused("write ENV NAME=VALUE ...")
    if step.name == "ARG" and len(shlex.split(step.text)) != 1:
        raise step.refused("write ARG NAME or ARG NAME=VALUE")
    return step


def _expression(pattern: str) -> re.Pattern[str]:
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    return re.compile("".join(wild.get(piece, re.escape(piece)) for piece in pieces))
