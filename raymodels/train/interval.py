"""When to save: every so many steps, every so often, or as often as pays (``checkpoint.every``)."""

from __future__ import annotations

import math

AUTO_OVERHEAD = 0.035
AUTO_MOST_S = 1800.0
AUTO_FIRST_S = 30.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# Llama 3's training: 419 unexpected interruptions in 54 days on 16,384 GPUs (A. Dubey et al., "The Llama 3 Herd of
# Models", 2024, section 3.3.4), that is one in about 50,000 hours of one worker.
WORKER_SECONDS_PER_FAILURE = 54 * 24 * 3600 * 16_384 / 419


class Interval:
    """Rank 0's decision. ``failures`` of this run so far and the ``seconds`` it has run inform ``auto``.

    Times are of a clock that nobody sets: one set back by an hour would have no save made for that hour.
    """

    def __init__(self, every: int | str, world_size: int, failures: int, seconds: float, now: float) -> None:
        self._every, self._last, self._blocked_s, self._writing_s = every, now, 0.0, 0.0
        self._between_failures_s = (seconds + WORKER_SECONDS_PER_FAILURE / world_size) / (failures + 1)

    def due(self, done: int, now: float) -> bool:
        """Whether to save after ``done`` steps."""
        if isinstance(self._every, int):
            return done % self._every == 0
        return now - self._last >= self.seconds()

    def saved(self, now: float, blocked_s: float) -> None:
        """A save has begun, for which training stood still so long."""
        self._last, self._blocked_s = now, max(blocked_s, self._blocked_s)

    def written(self, seconds: float) -> None:
        """A save has ended, so long after it began."""
        self._writing_s = max(seconds, self._writing_s)

    def seconds(self) -> float:
        """Between saves.

        For ``auto`` the optimum of Young and Daly, sqrt(2 x cost x time between failures) (J. Daly, "A higher order
        estimate of the optimum checkpoint interval", Future Gener. Comput. Syst. 22(3), 2006), but never so often that
        saving costs more than 3.5 % or a save is still being written, and every half an hour at least.
        """
        if isinstance(self._every, str) and self._every != "auto":
            return float(self._every[:-1]) * UNITS[self._every[-1]]
        if not self._blocked_s:
            return AUTO_FIRST_S
        optimum = math.sqrt(2 * self._blocked_s * self._between_failures_s)
        return max(min(optimum, AUTO_MOST_S), self._blocked_s / AUTO_OVERHEAD, self._writing_s)
