"""What the soak says in the end: a row for every kind of request, what went wrong in which case, and the bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Bar
from tests.soak.hostile_client import Outcome
from tests.soak.hostile_processes import LIMIT, Role
from tests.soak.hostile_requests import is_big
from tests.soak.polite_client import PROMPTS, Polite

MEBIBYTE = 1 << 20
ALLOWED = {503, 504}
FAILURES = {"internal_error", "replica_failed"}
"""Codes that are a status of 500 where the status has long been sent."""
ERROR_BYTES = 8192
"""Of an answer that is an error, its headers included: it names a field and a limit, and repeats no request."""
SHOWN = 5
"""Polite requests that are shown with what was in flight."""


@dataclass(frozen=True)
class Size:
    requests: int
    """Hostile ones."""
    first: int
    """Of them, after which memory is to be flat."""
    polite: int
    """Alone, and meanwhile."""
    per_s: float
    quantile: float
    rest_s: float
    timeout_s: float
    """Of a request, as the endpoint is told."""
    longest_s: float
    """For all hostile requests together; those that were not sent by then are missing."""


@dataclass
class Found:
    alone: list[Polite]
    meanwhile: list[Polite]
    hostile: list[Outcome]
    memory: list[dict[str, int]]
    """By role, after the first requests and at the end; bytes."""
    roles: list[Role]

    @property
    def sent(self) -> list[Outcome]:
        return [one for one in self.hostile if one.ended != "not connected"]

    @property
    def growth(self) -> float:
        before, after = (sum(held.values()) for held in self.memory)
        return after / before

    @property
    def wrong(self) -> list[Polite]:
        """Polite requests that were not answered, or not with what their prompt is always answered with."""
        texts = (Counter(one.text for one in self.alone if one.prompt == prompt) for prompt in range(len(PROMPTS)))
        right = [max(found, key=found.__getitem__, default="") for found in texts]
        return [one for one in self.alone + self.meanwhile if one.status != 200 or one.text != right[one.prompt]]

    @property
    def failures(self) -> list[Outcome]:
        """Hostile requests that the server failed at."""
        return [one for one in self.hostile if fails(one.status) or one.code in FAILURES]

    @property
    def held(self) -> list[Outcome]:
        """Hostile requests that were neither answered nor ended."""
        return [one for one in self.hostile if one.ended == "open"]

    def during(self, start_unix_s: float, end_unix_s: float) -> str:
        """The hostile requests that were in flight."""
        there = [o for o in self.hostile if o.start_unix_s < end_unix_s and o.start_unix_s + o.seconds > start_unix_s]
        return ", ".join(f"{one.number} ({one.kind})" for one in there)


def fails(status: int) -> bool:
    return status >= 500 and status not in ALLOWED


def slowest(sent: list[Any], quantile: float) -> float:
    taken = sorted(one.seconds for one in sent)
    return float(taken[int(quantile * (len(taken) - 1))]) if taken else 0.0


def rows(found: Found, size: Size) -> Iterator[dict[str, Any]]:
    by_kind: dict[str, list[Any]] = {"polite, alone": found.alone, "polite, meanwhile": found.meanwhile}
    for outcome in sorted(found.hostile, key=lambda outcome: outcome.kind):
        by_kind.setdefault(outcome.kind, []).append(outcome)
    for kind, sent in by_kind.items():
        ends = Counter(str(one.status or getattr(one, "ended", "not answered")) for one in sent)
        yield {
            "what": kind,
            "requests": len(sent),
            "ended": ", ".join(f"{end} {count}" for end, count in ends.most_common()),
            "p50 s": slowest(sent, 0.5),
            "p99 s": slowest(sent, 0.99),
            "longest s": slowest(sent, 1),
            "by case": getattr(max(sent, key=lambda one: one.seconds, default=None), "number", ""),
        }
    empty = {"p50 s": "", "p99 s": "", "longest s": "", "by case": ""}
    for role in found.roles:
        first, last = (held[role.name] // MEBIBYTE for held in found.memory)
        told = f"{first} MiB after {size.first} requests, {last} at the end, {role.most // MEBIBYTE} at most"
        yield {"what": f"{role.name}, processes", "requests": len(role.seen), "ended": told} | empty


def culprits(found: Found) -> Iterator[str]:
    """What went wrong, with the cases that were in flight."""
    for role in found.roles:
        for when in role.killed:
            yield f"the {role.name} was over {LIMIT // MEBIBYTE} MiB and killed during {found.during(when - 1, when)}"
    for one in found.failures:
        yield f"case {one.number} ({one.kind}): {one.status} {one.code}"
    for one in found.held:
        yield f"case {one.number} ({one.kind}): neither answered nor closed for {one.seconds:.0f} s"
    for kind, count in Counter(one.kind for one in found.hostile if one.plain).items():
        yield f"{count} of {kind}: an error that is not in the protocol's shape"
    if longest := max(found.hostile, key=lambda one: one.error_bytes, default=None):
        yield f"the longest error has {longest.error_bytes} bytes: case {longest.number} ({longest.kind})"
    wrong = found.wrong
    for polite in [*wrong[:SHOWN], *sorted(found.meanwhile, key=lambda one: -one.seconds)[:SHOWN]]:
        told = f", answered {polite.status} {polite.text[:100]!r}" if polite in wrong else ""
        there = found.during(polite.start_unix_s, polite.start_unix_s + polite.seconds)
        yield f"a polite request took {polite.seconds:.2f} s{told}; in flight: {there}"


def bars(found: Found, size: Size) -> list[Bar]:
    alone, meanwhile = (slowest(sent, size.quantile) for sent in (found.alone, found.meanwhile))
    return [
        Bar("hostile_requests", len(found.sent), ">=", size.requests),
        Bar("of_a_mebibyte_and_more", sum(is_big(one.number) for one in found.sent), ">=", size.requests // 4),
        Bar("neither_answered_nor_closed", len(found.held), "==", 0),
        *(Bar(f"{role.name}_deaths", len(role.ended), "==", 0) for role in found.roles),
        Bar("memory_growth", found.growth, "<=", 1.1),
        Bar("polite_requests_alone", len(found.alone), ">=", size.polite),
        Bar("polite_requests_meanwhile", len(found.meanwhile), ">=", size.polite),
        Bar("polite_not_answered_rightly", len(found.wrong), "==", 0),
        Bar(f"polite_p{100 * size.quantile:g}_ratio", meanwhile / alone, "<=", 2),
        Bar("polite_5xx", sum(fails(one.status) for one in found.alone + found.meanwhile), "==", 0),
        Bar("hostile_5xx", len(found.failures), "==", 0),
        Bar("longest_error_bytes", max((one.error_bytes for one in found.hostile), default=0), "<=", ERROR_BYTES),
    ]
