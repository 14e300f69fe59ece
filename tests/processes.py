"""Which processes run: those that a test kills, or expects to be gone."""

from __future__ import annotations

import re
from contextlib import suppress

import psutil


def descendants(of: psutil.Process, pattern: str) -> list[psutil.Process]:
    """Those of a process whose command line has the pattern; one that ends while it is looked at is none."""
    found = []
    for process in of.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if re.search(pattern, " ".join(process.cmdline())):
                found.append(process)
    return found
