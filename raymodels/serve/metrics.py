"""What the gateway measures of each request, for Prometheus. Counted in the gateway's own process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Histogram

from raymodels.serve.answers import Usage
from raymodels.serve.schema import Refused

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LABELS = ("model", "route")

REQUESTS = Counter("raymodels_serve_requests", "requests by HTTP status", (*LABELS, "status"))
FIRST_TOKEN = Histogram(
    "raymodels_serve_time_to_first_token_seconds", "from request to first text", LABELS, buckets=BUCKETS
)
DURATION = Histogram(
    "raymodels_serve_request_seconds", "from request to the end of its answer", LABELS, buckets=BUCKETS
)
TOKENS_IN = Counter("raymodels_serve_tokens_in", "prompt tokens", ("model",))
TOKENS_OUT = Counter("raymodels_serve_tokens_out", "generated tokens", ("model",))

CLIENT_LEFT = 499


class Clock:
    """Follows one request from its arrival. ``model`` stays empty until it is a known one, to bound the labels."""

    def __init__(self, route: str) -> None:
        self.model = ""
        self._route = route
        self._start = time.perf_counter()
        self._first = True

    def text(self) -> None:
        """Some text goes out; the first time counts."""
        if self._first:
            FIRST_TOKEN.labels(self.model, self._route).observe(time.perf_counter() - self._start)
        self._first = False

    def end(self, status: int, usage: Usage | None = None) -> None:
        REQUESTS.labels(self.model, self._route, str(status)).inc()
        DURATION.labels(self.model, self._route).observe(time.perf_counter() - self._start)
        if usage is not None:
            TOKENS_IN.labels(self.model).inc(usage.prompt_tokens)
            TOKENS_OUT.labels(self.model).inc(usage.completion_tokens)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Counts the request as ended if the body raises."""
        try:
            yield
        except Refused as refused:
            self.end(refused.problem.status)
            raise
        except asyncio.CancelledError:
            self.end(CLIENT_LEFT)
            raise
        except BaseException:
            self.end(500)
            raise
