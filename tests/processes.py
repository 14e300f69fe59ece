"""Which processes run: those that a test kills, or expects to be gone."""

from __future__ import annotations

from contextlib import suppress

import psutil


def descendants(of: psutil.Process, named: str) -> list[psutil.Process]:
    """Those of a process with ``named`` in their command line; one that ends while it is looked at is none."""
    found = []
    for process in of.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if named in " ".join(process.cmdline()):
                found.append(process)
    return found
