"""What one replica tells the autoscaler about its load: its queue, its rates, its time to first token."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from raymodels.serve.engine import EngineStats

RATE_S = 10.0
"""Time constant of the rates."""
SHAPE_S = 120.0
"""Time constant of what a request takes, which changes more slowly than how many there are."""
RECENT_S = 30.0
"""How long a time to first token counts as recent."""


class LoadMeter:
    """Follows the requests of one replica; `report` sums them up for `record_autoscaling_stats`.

    Requests are counted as choices, as the engine does. Averages decay exponentially, so that no request is kept.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = self._begin = clock()
        self._arrived = self._left = 0
        self._arrivals_per_s = self._full_tokens_per_s = self._full_s = 0.0
        self._recent_tokens = self._recent_left = 0.0
        self._tokens = 0
        self._was_queued = False
        self._held = (-math.inf, 0, 0)
        self._first_tokens: deque[tuple[float, float]] = deque()

    def arrived(self, choices: int) -> None:
        """Somebody asks for so many choices, whether or not they are taken: what is refused is demand too."""
        self._arrived += choices

    def left(self, choices: int) -> None:
        """So many choices that were taken have ended, in whatever way."""
        self._left += choices

    def first_token(self, seconds: float) -> None:
        """A request had its first token so long after it arrived."""
        self._first_tokens.append((self._clock(), seconds))

    def held(self, requests: int, tokens: int) -> None:
        """So many wait at the gateways for this model, none of them sent to a replica yet; told with each request."""
        self._held = (self._clock(), requests, tokens)

    def report(self, stats: EngineStats) -> dict[str, float]:
        """The load now; call it about once a second. Rates are of tokens of prompt and answer together.

        ``load_full_tokens_per_s`` is what this replica serves while requests wait for it; 0 until that has been seen.
        ``load_tokens_per_request`` is 0 until a request has ended.
        """
        now = self._clock()
        elapsed, self._at = now - self._at, now
        tokens = stats.tokens_in + stats.tokens_out
        served, self._tokens = tokens - self._tokens, tokens
        if elapsed > 0:
            self._count_arrivals(elapsed)
            self._count_tokens(elapsed, served, stats.queued > 0 and self._was_queued)
        self._was_queued = stats.queued > 0
        while self._first_tokens and self._first_tokens[0][0] < now - RECENT_S:
            self._first_tokens.popleft()
        held = self._held[1:] if now - self._held[0] <= RECENT_S else (0, 0)
        size = self._recent_tokens / self._recent_left if self._recent_left > 0 else 0.0
        return {
            "load_running": float(stats.running),
            "load_queued": float(stats.queued),
            "load_held": float(held[0]),
            "load_held_tokens": float(held[1]),
            "load_requests_per_s": self._arrivals_per_s / (1 - math.exp(-max(now - self._begin, 1e-9) / RATE_S)),
            "load_tokens_per_request": size,
            "load_full_tokens_per_s": self._full_tokens_per_s,
            "load_ttft_p95_s": self._ttft_p95(),
        }

    def _count_arrivals(self, elapsed: float) -> None:
        kept = math.exp(-elapsed / RATE_S)
        self._arrivals_per_s = kept * self._arrivals_per_s + (1 - kept) * self._arrived / elapsed
        self._arrived = 0

    def _count_tokens(self, elapsed: float, served: int, full: bool) -> None:
        kept = math.exp(-elapsed / SHAPE_S)
        self._recent_tokens = kept * self._recent_tokens + served
        self._recent_left = kept * self._recent_left + self._left
        self._left = 0
        if full:
            # A plain mean at first, and then one over about the last RATE_S of being full.
            self._full_s = min(self._full_s + elapsed, max(RATE_S, elapsed))
            self._full_tokens_per_s += (served / elapsed - self._full_tokens_per_s) * elapsed / self._full_s

    def _ttft_p95(self) -> float:
        seconds = sorted(seconds for _, seconds in self._first_tokens)
        return seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else 0.0
