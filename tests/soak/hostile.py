"""Hostile clients beside a polite one at a live endpoint: nothing falls over, nothing grows, and nobody else waits.

Eight clients send generated requests one after the other (`tests.soak.hostile_requests`; a quarter of a mebibyte and
more), of a tenant that has a quota; another tenant asks evenly for short greedy answers, first alone, then meanwhile.
What a case sends follows from ``--seed`` and its number: ``--only NUMBER`` replays it alone.

Two cores are shared by all. So the hostile clients run at the lowest priority, in a process of their own: they take the
time that is left, as if it were on machines of theirs, and what the polite tenant waits for is the server's own work.
Its answers of 48 tokens are long beside the 50 ms for which one body may hold the gateway up and the pieces of prompt
of 64 tokens that a step of the engine may have besides (``prefill_chunk``), and its model is so small that a step of
eight sequences takes little more than one of one: twice the time it takes alone leaves room for a server that does its
other work in bounded pieces, and for none that lets one request hold up all. A process over `LIMIT` is killed, as a
container's would be.

The bars: as many requests as asked for, each of them answered, or its connection closed, in bounded time; gateway and
replica are never replaced; their memory and that of their own processes, 10 s after the end, within 1.1 x of that
after the first tenth, which is looked at in the same way, 10 s after a pause has begun; every polite answer right; its
99th percentile within 2 x of that alone; no status of 5xx but 503 and 504, and no such error in a stream, to anybody;
no error of more than 8 KiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.endpoint import APPLICATION, serving, tiny_model
from benchmarks.report import report
from raymodels.serve.deploy import GATEWAY
from raymodels.serve.tenants import add_key
from tests.soak.hostile_bodies import CONTEXT
from tests.soak.hostile_client import Outcome, attack
from tests.soak.hostile_processes import Other, Role, Watch, watched
from tests.soak.hostile_report import MEBIBYTE, Found, Size, bars, culprits, rows
from tests.soak.hostile_requests import case, is_big
from tests.soak.polite_client import Polite
from tests.soak.size import add_size

CLIENTS, BATCH, TOKENS = 8, 8, 48
FULL = Size(2000, 200, 500, 6.0, 0.99, 10.0, 20.0, 1500.0)
SMALL = Size(200, 60, 60, 6.0, 0.95, 4.0, 5.0, 60.0)
SLACK_S = 25.0
"""Beyond the time that a request may take, for its headers to come and for whatever the client sees of its end."""


class Soak:
    """The clients of one endpoint.

    Args:
        url: the endpoint's.
        keys: by tenant.
    """

    def __init__(self, url: str, keys: dict[str, str], seed: int, size: Size, watch: Watch) -> None:
        address = urlsplit(url)
        self._size, self._watch, self._keys, self._seed = size, watch, keys, seed
        self._host, self._port = str(address.hostname), int(address.port or 80)
        self._longest_s = size.timeout_s + SLACK_S

    def run(self) -> Found:
        """The polite tenant alone, some hostile requests and a pause, the others beside the polite tenant, a pause."""
        size = self._size
        with self._polite_client() as alone:
            alone.at_least(size.polite)
        deadline = time.monotonic() + size.longest_s
        with self._hostile_clients(1) as first:
            first.at_least(size.first, deadline)
        memory = [self._memory_at_rest()]
        with self._polite_client() as polite, self._hostile_clients(len(first.lines) + 1) as hostile:
            big = size.requests // 4 - sum(is_big(line["number"]) for line in first.lines)
            hostile.at_least(size.requests - len(first.lines), deadline, big)
            polite.at_least(size.polite, deadline)
        memory.append(self._memory_at_rest())
        outcomes = [Outcome(**line) for line in first.lines + hostile.lines]
        before, meanwhile = ([Polite(**line) for line in client.lines] for client in (alone, polite))
        return Found(before, meanwhile, outcomes, memory, self._watch.roles)

    def replay(self, number: int) -> int:
        """Send one case alone and print how it ended; 0 if the endpoint has not failed at it."""
        before = self._watch.memory()
        outcome = attack(self._host, self._port, case(self._seed, number, self._keys), self._longest_s)
        after = self._memory_at_rest()
        print(outcome)
        for role in self._watch.roles:
            told = [held[role.name] // MEBIBYTE for held in (before, after)]
            print(f"{role.name}: {told[0]} MiB before, {told[1]} after, {role.most // MEBIBYTE} at most")
        found = Found([], [], [outcome], [before, after], self._watch.roles)
        print(*culprits(found), sep="\n")
        return int(bool(found.failures or found.held or any(role.ended for role in found.roles)))

    def _memory_at_rest(self) -> dict[str, int]:
        time.sleep(self._size.rest_s)
        return self._watch.memory()

    def _polite_client(self) -> Other:
        told = {"key": self._keys["polite"], "per_s": self._size.per_s, "tokens": TOKENS}
        return Other("tests.soak.polite_client", {"host": self._host, "port": self._port, **told})

    def _hostile_clients(self, first: int) -> Other:
        told: dict[str, Any] = {"keys": self._keys, "seed": self._seed, "clients": CLIENTS, "first": first}
        told |= {"host": self._host, "port": self._port, "longest_s": self._longest_s}
        return Other("tests.soak.hostile_client", told)


@contextmanager
def endpoint(ingress: str, timeout_s: float) -> Iterator[tuple[str, dict[str, str], Watch]]:
    """The address of an endpoint with three tenants, their keys by name, and its processes, watched."""
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary) / "keys.yaml")
        keys = {
            "polite": add_key(file, "polite"),
            "hostile": add_key(file, "hostile", requests_per_minute=6000, concurrency=CLIENTS - 1),
            "spent": add_key(file, "spent", requests_per_minute=1),
        }
        model = {"cpus": 0.5, "engine": {"max_batch": BATCH, "prefill_chunk": 64}}
        http = {"keys_file": file, "access_log": False, "ingress": ingress, "request_timeout_s": timeout_s}
        model_dir = tiny_model(Path(temporary) / "model", context=CONTEXT)
        roles = [Role("gateway", f"ray::ServeReplica:{GATEWAY}:"), Role("replica", f"ray::ServeReplica:{APPLICATION}:")]
        with serving(Path(temporary), model_dir, model, http) as served, watched(roles) as watch:
            yield served.url, keys, watch


def main() -> int:
    parser = argparse.ArgumentParser()
    add_size(parser, f"{SMALL.requests} hostile requests instead of {FULL.requests:,}")
    parser.add_argument("--seed", type=int, default=1, help="of all cases")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="send this case alone")
    parser.add_argument("--ingress", choices=["direct", "proxy"], default="direct")
    told = parser.parse_args()
    size = SMALL if told.size == "small" else FULL
    print(f"seed {told.seed}; each case can be sent alone: --seed {told.seed} --only NUMBER", flush=True)
    with endpoint(told.ingress, size.timeout_s) as (url, keys, watch):
        soak = Soak(url, keys, told.seed, size, watch)
        if told.only is not None:
            return soak.replay(told.only)
        found = soak.run()
    print(*culprits(found), sep="\n")
    return report("hostile", list(rows(found, size)), bars(found, size))


if __name__ == "__main__":
    sys.exit(main())
