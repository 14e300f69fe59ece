"""What the scripts in ``jobs/`` share: read the config, run one function, print plain lines, exit as it ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from raymodels.config import Config, ServeConfig, load
from raymodels.errors import RaymodelsError

Root = TypeVar("Root", Config, ServeConfig)


def main(run: Callable[[Root], object], root: type[Root], description: str | None) -> int:
    """Run a job's function on its config; returns the exit code, with a user's error as one line on stderr."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a YAML file, such as those in jobs/configs")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a key")
    arguments = parser.parse_args()
    try:
        run(load(arguments.config, arguments.overrides, root))
    except RaymodelsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def say(event: Mapping[str, Any]) -> None:
    """Print an event of a run as one line of ``key=value``, leaving out lists and tables."""
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in event.items()}
    plain = [f"{k}={v}" for k, v in shown.items() if k not in ("kind", "time") and isinstance(v, str | int)]
    print(event["kind"], *plain, flush=True)
