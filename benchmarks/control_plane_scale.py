"""What does not compute but decides, at the size of a thousand nodes: each part driven alone, with its own code.

The sizes: 1,000 models of 50 versions, 1,000 nodes of 8 ranks, 10,000 API keys of 1,000 tenants, a run of a month. Each
part is measured at a tenth of its size too. Seconds are of the CPU: a disk's or a bucket's answers come on top, and
docs/scale.md counts those.

The bars: ``NAME_cpu_seconds``, a budget that follows from how often the part is asked; ``NAME_growth``, its cost at ten
times the size. Where it may grow with the size, at most 25: a part that is linear comes to 10, and to some more as it
outgrows the caches; a quadratic one to 100. Where it may not grow, at most 3. ``--quick`` makes smaller registries and
records.
"""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.control_plane import (
    PARAMETERS,
    beats,
    checkpoint,
    context,
    fill_registry,
    record,
    save_tokenizer,
    table,
    zero_3_checkpoint,
)
from benchmarks.report import Bar, quick, report
from raymodels import manifest, runs
from raymodels.checkpoint import shards
from raymodels.checkpoint.shards import Shards, read_headers
from raymodels.config import (
    AutoscalingConfig,
    Config,
    HttpConfig,
    KeysConfig,
    TenantConfig,
    to_yaml,
    validate,
)
from raymodels.serve import autoscale
from raymodels.serve.admission import Admission, Queue, Turn
from raymodels.serve.capacity import Capacity, Replicas
from raymodels.serve.fair_queue import Room
from raymodels.serve.quotas import Quotas
from raymodels.serve.routing import Route, Routes
from raymodels.serve.scaling import ServePolicy
from raymodels.serve.schema import Refused
from raymodels.serve.tenants import Tenants, hashed
from raymodels.train.heartbeat import Beat
from raymodels.train.stacks import Stack
from raymodels.train.verdict import Bounds, accuse, overdue, slow_ranks
from raymodels.train.watch import POLL_SECONDS, RayNodes

LINEAR, CONSTANT = 25.0, 3.0


@dataclass(frozen=True)
class Part:
    """One part's cost, in seconds, and what it may cost.

    Args:
        cost: at a tenth of the size and at the size.
    """

    name: str
    size: str
    cost: list[float]
    budget: float
    growth: float | None
    budget_of: str

    @property
    def tenth(self) -> float:
        return self.cost[0]

    @property
    def seconds(self) -> float:
        return self.cost[1]

    @property
    def ratio(self) -> float:
        return self.seconds / self.tenth

    def row(self) -> dict[str, Any]:
        shown = {"part": self.name, "size": self.size, "ms at a tenth": 1e3 * self.tenth, "ms": 1e3 * self.seconds}
        return {**shown, "growth": round(self.ratio, 2), "budget, ms": 1e3 * self.budget, "which is": self.budget_of}

    def bars(self) -> list[Bar]:
        bars = [Bar(f"{self.name}_cpu_seconds", self.seconds, "<=", self.budget)]
        return [*bars, Bar(f"{self.name}_growth", self.ratio, "<=", self.growth)] if self.growth else bars


def best(action: Callable[..., Any], *given: Any, times: int = 5, repeat: int = 1) -> float:
    """CPU seconds of one call with what is given, the least of several tries: other work disturbs that least."""
    tries = []
    for _ in range(times):
        gc.collect()  # else it would come now and then, and cost by the libraries that are loaded
        gc.disable()
        start = time.process_time()
        for _ in range(repeat):
            action(*given)
        tries.append((time.process_time() - start) / repeat)
        gc.enable()
    return min(tries)


# The registry.


def registries(folder: Path, small: bool) -> list[Part]:
    models, versions = (200, 50) if small else (1000, 50)
    size = f"{models} models x {versions}"
    ten = fill_registry(folder / "tenth" / "registry", models // 10, versions)
    full = fill_registry(folder / "full" / "registry", models, versions)
    assert len(ten.versions()) == models // 10 * versions
    listing = [best(registry.versions, times=1) for registry in (ten, full)]
    names = [best(registry.names) for registry in (ten, full)]
    alias = [best(lambda r: r.resolve("m0007@prod"), registry, repeat=20) for registry in (ten, full)]
    # A thousandth of the budget a version: on the disk here, which an object store's round trips do not compare with.
    return [
        Part("registry_list", size, listing, models * versions * 1e-3, LINEAR, "1 ms a version"),
        Part("registry_names", size, names, 0.2, LINEAR, "a prompt answer"),
        Part("alias_lookup", size, alias, 0.05, CONSTANT, "nothing beside loading a model"),
    ]


# A run's record.


def records(folder: Path, small: bool) -> list[Part]:
    months = 0.2 if small else 1.0
    places = [record(folder / name, share, 8000) for name, share in (("tenth", months / 10), ("full", months))]
    show = [best(lambda p: shown(runs.open_run(p, "run")), place, times=1 + small) for place in places]
    size = (folder / "full" / "run" / "events.jsonl").stat().st_size / 1e6
    return [Part("runs_show", f"{30 * months:g} days, {size:.0f} MB", show, 30.0, LINEAR, "half a minute")]


def shown(run: runs.Run) -> None:
    assert run.row()["state"] == "finished" and run.account.timeline(60)


# A checkpoint.


def checkpoints(folder: Path, small: bool) -> list[Part]:
    parts: dict[str, list[float]] = {"acknowledge": [], "declare": [], "read": [], "verify": []}
    for ranks in (800, 8000):
        place = checkpoint(folder / str(ranks), ranks)
        files = [shards.file_name(rank, ranks, "00000000") for rank in range(ranks)]
        answers = [({name: manifest.entry(b"fragments of rank %d" % rank)}, rank) for rank, name in enumerate(files)]
        parts["acknowledge"].append(best(merged, answers))
        parts["declare"].append(best(lambda p, a: manifest.commit(p, merged(a)), place, answers))
        parts["read"].append(best(manifest.read, place))
        parts["verify"].append(best(lambda p, r: manifest.verify(p, share=(r // 2, r)), place, ranks))
    names = {
        "acknowledge": ("rank 0 puts acknowledgements together", 1.0, "nothing beside writing"),
        "declare": ("rank 0 writes the manifest", 1.0, "nothing beside writing"),
        "read": ("every rank, at a restore", 1.0, "nothing beside reading"),
        "verify": ("one rank's share, at a restore", 2.0, "nothing beside reading"),
    }
    return [
        Part(f"manifest_{name}", f"8,000 ranks; {what}", parts[name], budget, LINEAR, of)
        for name, (what, budget, of) in names.items()
    ]


def restores(folder: Path, small: bool) -> list[Part]:
    """What every rank does at a restore before it reads its elements: its share of the files, then what all found."""
    reads, puts = [], []
    for ranks in (51, 512):
        place = zero_3_checkpoint(folder / str(ranks), ranks)
        reads.append(best(lambda p, r: read_headers(p, (0, r)), place, ranks, times=1))
        answers = [pickle.dumps({file: header}) for file, header in read_headers(place).items()]
        puts.append(best(lambda p, a: put_together(p, a), place, answers, times=1))
    size = f"512 ranks, {PARAMETERS} parameters, "
    return [
        Part("restore_read", f"{size}own share", reads, 1.0, LINEAR, "a restart's part"),
        Part("restore_open", f"{size}all of it", puts, 60.0, LINEAR, "a restart's part"),
    ]


def put_together(place: str, answers: list[bytes]) -> None:
    Shards(place, {file: header for answer in answers for file, header in pickle.loads(answer).items()})


def merged(answers: list[tuple[manifest.Entries, int]]) -> manifest.Entries:
    """As `Saver` does, but for the exchange, with what pickling the answers costs rank 0."""
    received = [pickle.loads(pickle.dumps(answer)) for answer in answers]
    return {name: entry for files, _ in received for name, entry in files.items()}


# The gateway.


def gateways(folder: Path, small: bool) -> list[Part]:
    lookups, updates, looks = [], [], []
    for models in (100, 1000):
        routes, raw = Routes(table(models)), json.loads(json.dumps({n: asdict(r) for n, r in table(models).items()}))
        lookups.append(best(lambda r: (r.check("m0007"), r.table["m0007"].choose()), routes, repeat=1000))
        updates.append(best(lambda raw: {name: Route(**each) for name, each in raw.items()}, raw, repeat=3))
        capacity = Capacity(HttpConfig(), routes.table, {})
        counts = [{f"m{n:04}--v{v}": Replicas(k, "X") for n in range(models) for v in (1, 2, 3)} for k in (1, 2)]
        capacity.update(counts[0])
        looks.append(best(lambda c, counts: [c.update(each) for each in counts], capacity, counts, repeat=2) / 2)
    size = "1,000 models x 3 versions"
    return [
        Part("route_lookup", size, lookups, 1e-4, CONSTANT, "a tenth of a ms a request"),
        Part("route_update", size, updates, 0.05, LINEAR, "requests wait for it"),
        Part("capacity_look", size, looks, 0.2, LINEAR, "a tenth of 2 s"),
    ]


def keys(folder: Path, small: bool) -> list[Part]:
    loads, lookups = [], []
    for count in (100, 1000):
        tenants = [
            TenantConfig(name=f"t{n}", keys=tuple(hashed(f"key-{n}-{k}") for k in range(10)), tokens_per_minute=10**6)
            for n in range(count)
        ]
        file = folder / f"keys-{count}.yaml"
        file.write_text(to_yaml(KeysConfig(tenants=tuple(tenants))))
        loads.append(best(lambda f: Tenants(str(f)), file, times=2))
        known = Tenants(str(file))
        lookups.append(best(lambda k: k.of("Bearer key-7-3"), known, repeat=1000))
    size = "1,000 tenants, 10,000 keys"
    return [
        Part("keys_load", size, loads, 3.0, LINEAR, "its period, in a thread"),
        Part("keys_lookup", size, lookups, 1e-4, CONSTANT, "a tenth of a ms a request"),
    ]


async def through(tenants: int, each: int) -> float:
    """Seconds a request, when all tenants have requests waiting for one model that takes 32 at a time."""
    queue = Queue("m", Room(32, 10**6, 10**9))
    who = [TenantConfig(name=f"t{n}", keys=()) for n in range(tenants)]
    loop = asyncio.get_running_loop()

    async def ask(tenant: TenantConfig) -> None:
        turn = Turn(100, 1, deadline=loop.time() + 600)
        queue.enter(tenant, turn)
        await turn.wait()
        await everyone.wait()
        turn.used_tokens = 100
        queue.exit(turn)

    async def open_when_all_wait() -> None:
        while queue.waiting + queue.running < tenants * each:
            await asyncio.sleep(0)
        everyone.set()

    everyone = asyncio.Event()
    start = time.process_time()
    await asyncio.gather(open_when_all_wait(), *(ask(tenant) for tenant in who for _ in range(each)))
    return (time.process_time() - start) / (tenants * each)


async def refused(tenants: int) -> float:
    """Seconds a refusal, where all tenants wait, one of them with most, and the queue is full."""
    queue = Queue("m", Room(32, tenants, 10**9))
    who = [TenantConfig(name=f"t{n}", keys=()) for n in range(tenants)]
    loop = asyncio.get_running_loop()

    async def ask(tenant: TenantConfig) -> None:
        turn = Turn(100, 1, deadline=loop.time() + 600)
        queue.enter(tenant, turn)
        await turn.wait()

    waiting = [loop.create_task(ask(tenant)) for tenant in [*who[:32], *who]]
    while queue.waiting < tenants:
        await asyncio.sleep(0)
    start, rounds = time.process_time(), 200
    for _ in range(rounds):
        with suppress(Refused):
            await ask(who[0])
    seconds = (time.process_time() - start) / rounds
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return seconds


async def alone(tenants: int) -> float:
    """Seconds a request of a model with room, after so many tenants have asked it once."""
    admission = Admission(lambda model: Room(32, 10**6, 10**9), Quotas())
    loop, who = asyncio.get_running_loop(), [TenantConfig(name=f"t{n}", keys=()) for n in range(tenants)]
    start = 0.0
    for round in range(2):
        start = time.process_time()
        for tenant in who:
            async with admission.slot(tenant, "m", 100, 1, loop.time() + 600) as slot:
                slot.used_tokens = 100 + round
    return (time.process_time() - start) / tenants


def queues(folder: Path, small: bool) -> list[Part]:
    busy = [min(asyncio.run(through(tenants, 3)) for _ in range(3)) for tenants in (100, 1000)]
    full = [min(asyncio.run(refused(tenants)) for _ in range(3)) for tenants in (100, 1000)]
    idle = [min(asyncio.run(alone(tenants)) for _ in range(3)) for tenants in (100, 1000)]
    return [
        Part("fair_queue_busy", "1,000 tenants waiting", busy, 1e-3, CONSTANT, "a ms a request"),
        Part("fair_queue_full", "1,000 tenants waiting", full, 1e-3, LINEAR, "a ms a refusal"),
        Part("fair_queue_idle", "1,000 tenants seen", idle, 1e-3, LINEAR, "a ms a request"),
    ]


def decisions(folder: Path, small: bool) -> list[Part]:
    config = AutoscalingConfig(max_replicas=100, target_ttft_s=1.0)

    def decide(models: int) -> None:
        for number in range(models):
            load = {"running": number % 300, "queued": number % 7, "queued_tokens": 100.0 * (number % 7)}
            rates = {"arriving_tokens_per_s": 10.0 * (number % 90), "replica_tokens_per_s": 400.0, "ttft_p95_s": 0.5}
            seen = autoscale.Observation(now=60.0, replicas=1 + number % 20, starting=number % 3, **load, **rates)
            autoscale.decide(seen, autoscale.State(busy_at=0.0, more_since=10.0), config)

    def serve(policies: list[ServePolicy]) -> None:
        for number, policy in enumerate(policies):
            policy(context(number))

    policies = [ServePolicy(**config.model_dump(mode="json")) for _ in range(1000)]
    cost = [best(decide, models) for models in (100, 1000)]
    whole = [best(lambda m: serve(policies[:m]), models) for models in (100, 1000)]
    return [
        Part("autoscaler", "1,000 models", cost, 0.1, LINEAR, "a tenth of a replica's report period"),
        Part("autoscaler_in_serve", "1,000 models", whole, 0.5, LINEAR, "half of that period"),
    ]


# The watch.


class Answering:
    """In a sentry's place: Ray's calls are measured, not the reading of files."""

    def __init__(self) -> None:
        self._beats = beats(8)

    def beats(self) -> list[Beat]:
        return self._beats


class Posted(RayNodes):
    """As many nodes as are asked for, of which a few actors answer."""

    def __init__(self, actors: list[Any], count: int) -> None:
        super().__init__("")
        self._sentries = {str(node): actors[node % len(actors)] for node in range(count)}

    def _post_sentries(self) -> None:
        pass


def sentries(folder: Path, small: bool) -> list[Part]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actors = [ray.remote(num_cpus=0)(Answering).remote() for _ in range(4)]
        ray.get([actor.beats.remote() for actor in actors])  # they are up
        cost = [best(Posted(actors, nodes).beats) for nodes in (100, 1000)]
    finally:
        ray.shutdown()
    return [Part("watch_ask", "1,000 nodes", cost, POLL_SECONDS, LINEAR, "its period")]


def verdicts(folder: Path, small: bool) -> list[Part]:
    looks, found = [], []
    stack = Stack(problem="none")
    for ranks in (800, 8000):
        well = beats(ranks)
        looks.append(best(lambda b: (slow_ranks(b), overdue(b, Bounds())), well))
        hung = beats(ranks, phase="data", marks=400)
        stacks = dict.fromkeys(range(ranks), stack)
        found.append(best(lambda b, s: named(accuse(b, s, Bounds())), hung, stacks))
    return [
        Part("watch_look", "8,000 ranks", looks, POLL_SECONDS, LINEAR, "its period"),
        Part("watch_verdict", "8,000 ranks", found, 2.0, LINEAR, "of the 10 s it has"),
    ]


def named(verdict: Any) -> None:
    assert verdict is not None and verdict.rank == 7


# The planner.


def planners(folder: Path, small: bool) -> list[Part]:
    from raymodels.train.planner import plan

    def config(nodes: int) -> Config:
        shape = {"arch": "llama", "hidden_size": 1024, "layers": 8, "heads": 8}
        raw = {
            "run": {"name": "x"},
            "data": {"source": "python-stdlib", "seq_len": 2048, "tokenizer": {"from": str(folder / "tokenizer")}},
            "model": shape,
            "train": {"steps": 10, "global_batch": 8 * nodes, "micro_batch": 1, "lr": 1e-3},
            "zero": {"stage": 3},
            "workers": {"count": 8 * nodes, "gpus": 1, "device_memory": "80GB"},
        }
        return validate(raw, Config)

    save_tokenizer(folder / "tokenizer")
    cost = [best(lambda n: plan(config(n)), nodes, times=2) for nodes in (51, 512)]
    return [Part("planner", "512 nodes", cost, 30.0, CONSTANT, "a start-up's part")]


PARTS = (registries, records, checkpoints, restores, gateways, keys, queues, decisions, sentries, verdicts, planners)


def main() -> int:
    small, found = quick(), []
    gc.freeze()  # what the libraries hold is not looked through again
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            found += part(Path(folder), small)
            print(f"{part.__name__}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return report("control_plane_scale", [part.row() for part in found], [b for part in found for b in part.bars()])


if __name__ == "__main__":
    sys.exit(main())
