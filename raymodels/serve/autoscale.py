"""The autoscaling policy: from what is seen of a model to a number of replicas, with the reason in words.

A pure function, so that it is tested without a cluster and replayed on a trace. Read aloud: without a replica, the
first request orders ``first_replicas``. After ``idle_s`` without any request the last one goes, if none need stay. In
between the replicas needed are the most that any of these asks for:

- requests in flight, ``target_ongoing_requests`` to a replica;
- tokens, once it is known how many a full replica serves: those that arrive and those that will wait when a replica
  ordered now has started, to be gone in ``drain_s``, at ``target_load`` of a full replica. What is already starting
  counts as there, so that nothing is ordered twice;
- the time to first token, where ``target_ttft_s`` is set and requests wait.

Needing more for ``upscale_delay_s`` without a break orders them. Needing fewer, even with ``dead_band`` to spare, for
``downscale_delay_s`` without a break lets go all but the most that was needed meanwhile. Each time at most
``max_step_up`` or ``max_step_down`` of those there, and at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raymodels.config import AutoscalingConfig

Rule = Literal["bounds", "from zero", "to zero", "in flight", "tokens", "time to first token", "spare", "keep"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of a model at one moment.

    Args:
        now: seconds on any clock that only goes forward.
        replicas: those that answer.
        starting: ordered, and not answering yet.
        running: requests that are being computed.
        queued: requests that wait, at a replica or for the first one.
        queued_tokens: tokens that those will take, of prompt and answer.
        arriving_tokens_per_s: tokens that the requests arriving per second will take, refused ones too.
        replica_tokens_per_s: what one replica serves while requests wait for it; 0 until that is known.
        ttft_p95_s: recent 95th percentile of the time to first token, seconds; 0 if there was none.
        start_up_s: from ordering a replica to its first answer, seconds, as measured; 0 until that is known.
    """

    now: float
    replicas: int
    starting: int
    running: float = 0.0
    queued: float = 0.0
    queued_tokens: float = 0.0
    arriving_tokens_per_s: float = 0.0
    replica_tokens_per_s: float = 0.0
    ttft_p95_s: float = 0.0
    start_up_s: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """What the policy remembers from one decision to the next. Times are of the observations' clock."""

    busy_at: float | None = None
    """When there last was a request; at first, when the model was first seen."""
    more_since: float | None = None
    """Since when more replicas are needed than there are."""
    fewer_since: float | None = None
    """Since when fewer would be enough."""
    enough: int = 0
    """The most that were needed since then."""


class Decision(NamedTuple):
    """How many replicas there should be, those starting included, and why."""

    replicas: int
    rule: Rule
    reason: str
    state: State


class Need(NamedTuple):
    """Replicas that one of the rules asks for, not rounded."""

    replicas: float
    rule: Rule
    reason: str


def decide(seen: Observation, state: State, config: AutoscalingConfig) -> Decision:
    """How many replicas there should be now. Always within ``min_replicas`` and ``max_replicas``."""
    there = seen.replicas + seen.starting
    work = seen.running + seen.queued
    busy_at = seen.now if work > 0 or state.busy_at is None else state.busy_at
    rested = State(busy_at)
    bounded = min(max(there, config.min_replicas), config.max_replicas)
    if bounded != there:
        limits = f"{config.min_replicas} to {config.max_replicas} replicas are allowed"
        return Decision(bounded, "bounds", f"{there} are there, {limits}", rested)
    if there == 0:
        if work == 0:
            return Decision(0, "keep", "no replica and no request", rested)
        first = min(config.first_replicas, config.max_replicas)
        return Decision(first, "from zero", f"there is no replica, and requests wait: {work:,.0f}", rested)
    if seen.replicas == 0:
        return Decision(there, "keep", f"the first of {there} replicas is starting", rested)
    if config.min_replicas == 0 and work == 0 and seen.now - busy_at >= config.idle_s:
        return Decision(0, "to zero", f"no request for {seen.now - busy_at:,.0f} s", rested)
    need = needed(seen, config)
    wanted = max(math.ceil(need.replicas), 1)
    if min(wanted, config.max_replicas) > there:
        return _more(there, wanted, need, seen.now, rested, state, config)
    enough = max(math.ceil(need.replicas * (1 + config.dead_band)), config.min_replicas, 1)
    if enough < there:
        return _fewer(there, enough, need, seen, rested, state, config)
    return Decision(there, "keep", f"{need.reason}: {need.replicas:,.1f} needed, {there} there", rested)


def needed(seen: Observation, config: AutoscalingConfig) -> Need:
    """The rule that asks for the most replicas."""
    needs = [_for_requests(seen, config)]
    if seen.replica_tokens_per_s > 0:
        needs.append(_for_tokens(seen, config))
    late = config.target_ttft_s is not None and seen.ttft_p95_s > config.target_ttft_s
    if late and seen.queued > 0 and seen.starting == 0:
        needs.append(_for_first_token(seen, config))
    return max(needs)


def _for_requests(seen: Observation, config: AutoscalingConfig) -> Need:
    # While it is not known what a replica can do, a queue is more requests in flight; then it is so many tokens.
    waiting = 0.0 if seen.replica_tokens_per_s > 0 else seen.queued
    requests = seen.running + waiting
    reason = f"{requests:,.0f} requests in flight at {config.target_ongoing_requests:g} to a replica"
    return Need(requests / config.target_ongoing_requests, "in flight", reason)


def _for_tokens(seen: Observation, config: AutoscalingConfig) -> Need:
    one = seen.replica_tokens_per_s
    growth = seen.arriving_tokens_per_s - one * (seen.replicas + seen.starting)
    then = max(0.0, seen.queued_tokens + growth * (seen.start_up_s or config.start_up_s))
    waiting = f" and {then:,.0f} will wait when a new replica answers" if then else ""
    reason = f"{seen.arriving_tokens_per_s:,.0f} tokens/s arrive{waiting}, a full replica serves {one:,.0f}"
    return Need((seen.arriving_tokens_per_s + then / config.drain_s) / (one * config.target_load), "tokens", reason)


def _for_first_token(seen: Observation, config: AutoscalingConfig) -> Need:
    assert config.target_ttft_s is not None
    reason = f"the first token takes {seen.ttft_p95_s:.1f} s of {config.target_ttft_s:g}, and requests wait"
    return Need(seen.replicas * seen.ttft_p95_s / config.target_ttft_s, "time to first token", reason)


def _more(
    there: int, wanted: int, need: Need, now: float, rested: State, state: State, config: AutoscalingConfig
) -> Decision:
    since = now if state.more_since is None else state.more_since
    if now - since < config.upscale_delay_s:
        waiting = State(rested.busy_at, more_since=since)
        return Decision(there, "keep", f"{need.reason}: {wanted} needed, for {now - since:.0f} s so far", waiting)
    most = min(there + max(1, int(there * config.max_step_up)), config.max_replicas)
    return Decision(min(wanted, most), need.rule, f"{need.reason}: {wanted} needed, {there} there", rested)


def _fewer(
    there: int, enough: int, need: Need, seen: Observation, rested: State, state: State, config: AutoscalingConfig
) -> Decision:
    since = seen.now if state.fewer_since is None else state.fewer_since
    enough = min(max(enough, state.enough), there)
    # A replica that goes must be worth its coming back.
    if seen.now - since < max(config.downscale_delay_s, seen.start_up_s):
        waiting = State(rested.busy_at, fewer_since=since, enough=enough)
        return Decision(there, "keep", f"{need.reason}: {enough} are enough, for {seen.now - since:.0f} s", waiting)
    least = there - max(1, int(there * config.max_step_down))
    for_long = f"for {seen.now - since:,.0f} s {enough} have been enough, {there} are there"
    return Decision(max(enough, least), "spare", f"{need.reason}: {for_long}", rested)
