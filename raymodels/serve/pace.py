"""How often a stream is sent a piece: at once while a replica has few streams, in larger pieces when it has many.

But never much less often than people notice: `LONGEST_S` bounds the time between two pieces, whatever they cost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PIECES_PER_CORE_S = 50.0
"""Pieces a second of one core of the machine. A piece costs a few milliseconds of one on its way to the client."""
PIECES_PER_COMPUTING_CORE_S = 6.0
"""The same where the model is computed by the cores, and waits for every one of them."""
LONGEST_S = 0.2
"""Most seconds that belong between two pieces of a stream."""


class Pace:
    """Shares out the pieces that a replica sends among its open streams.

    Args:
        pieces_per_s: of all streams together; default: what the machine's cores carry.
    """

    def __init__(self, pieces_per_s: float | None = None) -> None:
        per_core = PIECES_PER_CORE_S if torch.cuda.is_available() else PIECES_PER_COMPUTING_CORE_S
        self._pieces_per_s = pieces_per_s or per_core * len(os.sched_getaffinity(0))
        self._streams = 0

    @contextmanager
    def answer(self, streamed: bool) -> Iterator[Callable[[], float]]:
        """Gives what says how many seconds belong between two pieces of this answer now.

        They are infinite if nobody sees the answer before its end.
        """
        self._streams += streamed
        try:
            yield lambda: min(self._streams / self._pieces_per_s, LONGEST_S) if streamed else math.inf
        finally:
            self._streams -= streamed
