"""What the scripts in ``jobs/`` share: read the config, run one function, exit as it ended."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from raymodels.config import Config, ServeConfig, load
from raymodels.errors import RaymodelsError

INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended

Root = TypeVar("Root", Config, ServeConfig)


def main(run: Callable[[Root], object], root: type[Root], description: str | None) -> int:
    """Run a job's function on its config; returns the exit code, with a user's error as one line on stderr."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a YAML file, such as those in jobs/configs")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a key")
    arguments = parser.parse_args()
    # `ray job stop` sends SIGTERM: let it unwind as Ctrl-C does, so that workers and endpoints are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(load(arguments.config, arguments.overrides, root))
    except RaymodelsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
