"""How much a program tries, as its command line says."""

from __future__ import annotations

import argparse


def add_size(parser: argparse.ArgumentParser, small: str = "as much as CI has the time for") -> None:
    parser.add_argument("--size", choices=["small", "full"], default="full", help=f"small: {small}")


def small() -> bool:
    """Whether ``--size small`` was asked for on the command line."""
    parser = argparse.ArgumentParser()
    add_size(parser)
    return bool(parser.parse_args().size == "small")
