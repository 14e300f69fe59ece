"""The autoscaling policy inside Ray Serve: from Serve's context to an observation, and from a decision to its target.

Serve calls a policy about ten times a second in its controller, and applies delays, factors and a cold start of its own
around it. The delays are set to zero here, since the policy has its own. Serve's cold start stays: without a replica
that answers Serve does not ask the policy, but orders ``upscaling_factor`` replicas at the first request, which the
handle that holds the request reports at once. So ``first_replicas`` is that factor, and it is divided out again of what
the policy wants later.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.util.metrics import Counter, Gauge

from raymodels.config import AutoscalingConfig
from raymodels.serve.autoscale import Decision, Observation, State, decide

log = logging.getLogger("ray.serve")

REPORT_S = 1.0
"""How often replicas and handles report to the controller."""
WINDOW_S = 5.0
"""What Serve's own count of requests is averaged over."""


def serve_settings(config: AutoscalingConfig) -> dict[str, Any]:
    """Serve's ``autoscaling_config`` for a deployment that this policy scales."""
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        "upscaling_factor": config.first_replicas,
        "metrics_interval_s": REPORT_S,
        "look_back_period_s": WINDOW_S,
        "policy": {
            "policy_function": f"{__name__}:ServePolicy",
            "policy_kwargs": config.model_dump(mode="json"),
        },
    }


@dataclass(frozen=True)
class StartUp:
    """What replicas take to start, measured from order to answer."""

    seconds: float = 0.0
    since: float | None = None
    """When the oldest order was given that is still being waited for."""
    replicas: int = 0
    """Those that answered when last looked."""
    looked_at: float = 0.0


class ServePolicy:
    """The policy of one deployment. Ray Serve makes it from ``policy_kwargs``: the fields of `AutoscalingConfig`."""

    def __init__(self, **settings: Any) -> None:
        self._config = AutoscalingConfig(**settings)
        tags = ("model", "rule")
        self._changes = Counter(
            "raymodels_serve_scaling_decisions_total", "changes of the number of replicas by the rule behind them", tags
        )
        self._wanted = Gauge("raymodels_serve_replicas_wanted", "replicas that the policy wants", ("model",))

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas, in Serve's terms, and the state to be called with next time."""
        limits = {
            "min_replicas": ctx.capacity_adjusted_min_replicas,
            "max_replicas": ctx.capacity_adjusted_max_replicas,
        }
        config = self._config.model_copy(update=limits)
        start_up = watched(ctx, ctx.policy_state.get("start_up", StartUp()))
        seen = observation(ctx, start_up.seconds)
        decision = decide(seen, ctx.policy_state.get("state", State()), config)
        self._tell(ctx, decision)
        kept = {"state": decision.state, "start_up": start_up}
        return undone(decision.replicas, ctx.current_num_replicas, config.first_replicas), kept

    def _tell(self, ctx: AutoscalingContext, decision: Decision) -> None:
        model, before = ctx.deployment_name, ctx.target_num_replicas
        self._wanted.set(decision.replicas, {"model": model})
        if decision.replicas != before:
            log.info(f"{model}: {before} -> {decision.replicas} replicas, {decision.rule}: {decision.reason}")
            self._changes.inc(1, {"model": model, "rule": decision.rule})


def observation(ctx: AutoscalingContext, start_up_s: float) -> Observation:
    """What Serve and the replicas' own reports (`raymodels.serve.load`) say; the latest of each, not Serve's average.

    A replica that reports nothing counts with Serve's number of its requests.
    """
    reports = ctx.raw_metrics or {}
    latest = {name: [series[-1].value for series in by.values() if series] for name, by in reports.items()}
    unsent = ctx.total_queued_requests or 0.0
    running, queued = max(0.0, ctx.total_num_requests - unsent), unsent
    if latest.get("load_running"):
        running, queued = sum(latest["load_running"]), sum(latest["load_queued"])
        # Serve's count is older: what it has as unsent may be what the replicas have by now.
        queued += min(unsent, max(0.0, ctx.total_num_requests - running - queued))
    # Every replica is told of the same requests that the gateways hold back.
    held, held_tokens = (max(latest.get(name, []), default=0.0) for name in ("load_held", "load_held_tokens"))
    size = _mean_of_known(latest.get("load_tokens_per_request", []))
    return Observation(
        now=ctx.current_time,
        replicas=ctx.current_num_replicas,
        starting=max(0, ctx.target_num_replicas - ctx.current_num_replicas),
        running=running,
        queued=queued + held,
        queued_tokens=queued * size + held_tokens,
        arriving_tokens_per_s=sum(latest.get("load_requests_per_s", [])) * size,
        replica_tokens_per_s=_mean_of_known(latest.get("load_full_tokens_per_s", [])) if size else 0.0,
        ttft_p95_s=max(latest.get("load_ttft_p95_s", []), default=0.0),
        start_up_s=start_up_s,
    )


def watched(ctx: AutoscalingContext, start_up: StartUp) -> StartUp:
    """The start-up time, measured anew whenever a replica that was ordered begins to answer."""
    seconds, since = start_up.seconds, start_up.since
    ordered = ctx.last_scale_up_time
    if since is None and ordered is not None and ordered >= start_up.looked_at:
        since = ordered
    if since is not None and ctx.current_num_replicas > start_up.replicas:
        seconds, since = ctx.current_time - since, None
    if ctx.current_num_replicas >= ctx.target_num_replicas:
        since = None
    return StartUp(seconds, since, ctx.current_num_replicas, ctx.current_time)


def undone(replicas: int, running: int, factor: int) -> float:
    """What Serve turns into ``replicas``: it multiplies the way up from those running by its factor and rounds up."""
    if running == 0 or replicas <= running or factor == 1:
        return replicas
    return running + (replicas - running - 0.5) / factor


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if value > 0]
    return sum(known) / len(known) if known else 0.0
