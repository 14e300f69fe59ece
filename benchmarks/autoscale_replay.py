"""The autoscaling policy replayed on a day of 1,000 replicas: how fast the replay is, and how well the policy does.

The bars: 24 hours in under 10 s for each kind of trace, the same model at a thousand replicas; on a step from nothing
the first decision within 5 s, at most one reversal until the load ends, no replica left after it; at a thousand
replicas the queue gone in ten minutes, and at few of them every request served, begun within two start-ups.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Bar, quick, report
from raymodels.config import AutoscalingConfig
from raymodels.serve.replay import Fleet, Replay, picture, replay
from raymodels.serve.traces import SHAPES, synthetic

REPLICAS = 1000
TOKENS = 200.0
"""Of a prompt and of an answer, each."""
FLEET = Fleet(slots=32, max_queue=256, request_tokens_per_s=25.0, replica_tokens_per_s=400.0, start_up_s=60.0)
POLICY = AutoscalingConfig(min_replicas=0, max_replicas=2 * REPLICAS, target_ongoing_requests=24)
HELD_RATE = 2.0
"""Requests/s of the step of which all are served: the queue has room for those of two start-ups."""


def timed(shape: str, hours: float, rate: float) -> tuple[Replay, float, float]:
    """A replay, the seconds it took, and the seconds its picture took."""
    trace = synthetic(shape, hours, rate, TOKENS, TOKENS, seed=0)
    start = time.perf_counter()
    result = replay(trace, POLICY, FLEET)
    simulated = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        picture(result, Path(folder) / "replay.png")
    return result, simulated - start, time.perf_counter() - simulated


def row(result: Replay, seconds: float, drawn: float) -> dict[str, Any]:
    shown = result.summary()
    names = ("trace", "hours", "requests", "refused", "replica_hours", "most_replicas", "most_queued")
    more = ("wait_p95_s", "wait_p99_s", "decisions", "reversals")
    return {**{name: shown[name] for name in (*names, *more)}, "seconds": seconds, "drawing": drawn}


def main() -> int:
    hours = 3.0 if quick() else 24.0
    # A thousand replicas are full at this rate; the bursts and the day reach it, the step holds it.
    full = REPLICAS * FLEET.replica_tokens_per_s / (2 * TOKENS)
    results = [timed(shape, hours, full * POLICY.target_load) for shape in SHAPES]
    held, seconds, drawn = timed("step", hours, HELD_RATE)
    step = next(result for result, *_ in results if result.trace.name == "step")
    bars = [
        Bar("seconds_slowest", max(took for _, took, _ in results), "<", 10.0),
        Bar("most_replicas_of_step", int(step.replicas.max()), ">=", REPLICAS),
        Bar("first_decision_seconds", max(first_decision(result) for result in (step, held)), "<=", 5),
        Bar("reversals_on_steady_load", max(until_end(result) for result in (step, held)), "<=", 1),
        Bar("replicas_after_load", max(int(result.ordered[-1]) for result in (step, held)), "==", 0),
        Bar("refused_of_held", int(held.refused.sum()), "==", 0),
        Bar("unserved_of_held", int(held.trace.requests.sum()) - held.served, "==", 0),
        Bar("longest_wait_of_held_s", float(held.longest_wait.max()), "<=", 2 * FLEET.start_up_s),
        Bar("seconds_until_step_is_met", met(step), "<=", 600),
    ]
    return report("autoscale_replay", [row(*result) for result in [*results, (held, seconds, drawn)]], bars)


def first_decision(result: Replay) -> int:
    """Seconds from the first request to the first change."""
    return result.changes[0].second - int(result.trace.requests.nonzero()[0][0])


def until_end(result: Replay) -> int:
    """Reversals while the step's load lasts."""
    end = int(result.trace.requests.nonzero()[0][-1])
    changes = [change for change in result.changes if change.second <= end]
    return Replay(**{**vars(result), "changes": changes}).reversals


def met(result: Replay) -> int:
    """Seconds from the first request to the last that found a queue."""
    return int(result.queued.nonzero()[0][-1] - result.trace.requests.nonzero()[0][0])


if __name__ == "__main__":
    sys.exit(main())
