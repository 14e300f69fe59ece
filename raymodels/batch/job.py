"""A batch from its beginning to its end, over as many starts as it takes.

    OUTPUT.jsonl             the answers, in the order of the input
    OUTPUT.errors.jsonl      the lines that failed, if any, in the same order
    OUTPUT.batch.json        what the batch is of, written first; "completed" in it, written last, makes both valid
    OUTPUT.parts/N.jsonl     what part N of the input came to, until all parts are there

A part's file is written whole by the driver, which alone writes. So after any end, kill -9 included, the parts that
are there are finished, the others are not, and the next start works on those. The outputs are put together from all
parts, which are deleted once the record says that the batch is completed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import ray
import ray.data
from ray._private.log import PlainRayHandler

from raymodels import manifest, storage
from raymodels.batch.answerer import Answerer, lines_at_once
from raymodels.batch.lines import PART_BYTES, PART_LINES, Input, Json, Part, index
from raymodels.cluster import asking_for, connect, wait_for_room
from raymodels.config import ModelServeConfig, WorkersConfig
from raymodels.errors import ConfigError, IntegrityError, RaymodelsError, RunInUse
from raymodels.registry import Registry, Version
from raymodels.serve.adapter_sources import check_all, fingerprint, resolved

SPEED = {"max_batch", "max_queue", "prefill_chunk", "kv_memory", "prefix_cache", "threads"}
"""Settings of the engine that may change between two starts: they change how fast it answers, not what."""
COMPLETED, IN_PROGRESS = "completed", "in_progress"


@dataclass(frozen=True)
class Batch:
    """What to answer, where to, and with what.

    Args:
        input, output: places of JSON lines.
        model: which version, under which name, with which adapters and how much of a machine. Its autoscaling is not
            looked at.
        replicas: how many actors answer side by side.
        start_timeout_s: how long to wait for a cluster that can hold them.
        unnamed: the name, the model's or an adapter's, that lines without one mean; default: the model's.
    """

    input: str
    output: str
    registry: str
    model: ModelServeConfig
    replicas: int = 1
    start_timeout_s: float = 600.0
    unnamed: str | None = None

    @property
    def _stem(self) -> str:
        return self.output.removesuffix(".jsonl")

    @property
    def errors(self) -> str:
        return f"{self._stem}.errors.jsonl"

    @property
    def record(self) -> str:
        return f"{self._stem}.batch.json"

    @property
    def parts(self) -> str:
        return f"{self._stem}.parts"


@dataclass(frozen=True)
class Counts:
    """Lines that are done, answered or failed, and the tokens of those answered."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def lines(self) -> int:
        return self.completed + self.failed

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Summary:
    """A completed batch. ``before`` is what earlier starts had done, ``seconds`` is what this one took."""

    counts: Counts
    before: Counts
    seconds: float
    output: str
    errors: str | None


def run(
    batch: Batch,
    on_progress: Callable[[Counts, int], None] = lambda counts, lines: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Answer every line of the input, or what an earlier start has left of it.

    Args:
        on_progress: is told what is done so far, of how many lines.
        notice: is told in a sentence what it waits for.

    Raises:
        ConfigError: the output is of another batch; says what differs.
        RunInUse: another process works on this batch.
        AdapterError: an adapter cannot be used with the model; says why.
        DataError, RegistryError, IntegrityError, StorageError, ClusterError, ServeError: of input, model or cluster.
    """
    began = time.monotonic()
    batch = replace(
        batch,
        input=storage.absolute(batch.input),
        output=storage.absolute(batch.output),
        registry=storage.absolute(batch.registry),
    )
    if batch.input in (batch.output, batch.errors):
        raise ConfigError(f"{batch.input} is both read and written: name another output")
    registry = Registry(batch.registry)
    version = registry.resolve(batch.model.model)
    given = index(batch.input)
    adapters = {name: resolved(source, registry) for name, source in batch.model.adapters.items()}
    check_all(adapters, registry, version)
    batch = replace(batch, model=batch.model.model_copy(update={"adapters": adapters}))
    with _alone(batch):
        record = _begun(batch, _identity(batch, version, given))
        if record["status"] != COMPLETED:
            counts, before = _work(batch, version, given, on_progress, notice)
            _assemble(batch, given, counts)
            storage.write_json(batch.record, record | {"status": COMPLETED, "counts": asdict(counts)})
        else:
            counts = before = Counts(**record["counts"])
        storage.delete(batch.parts)
    errors = batch.errors if counts.failed else None
    return Summary(counts, before, time.monotonic() - began, batch.output, errors)


def _identity(batch: Batch, version: Version, given: Input) -> Json:
    """All that must be the same for parts of two starts to go together."""
    return {
        "input_sha256": given.sha256,
        "model": version.reference,
        "model_sha256": manifest.digest(version.place),
        "served_as": batch.model.public_name,
        "unnamed": batch.unnamed,
        "adapters": {name: _adapter(source) for name, source in batch.model.adapters.items()} or None,
        **{f"engine.{key}": value for key, value in batch.model.engine.model_dump(exclude=SPEED, mode="json").items()},
        "part": f"{PART_LINES} lines or {PART_BYTES} bytes",
    }


def _adapter(source: str) -> str:
    """A resolved source, and what it holds."""
    return f"{source} {hashlib.sha256(fingerprint(source).encode()).hexdigest()[:16]}"


def _begun(batch: Batch, identity: Json) -> Json:
    """The record of this batch: the one that is there, or a new one.

    Raises:
        ConfigError: what is there is something else.
    """
    if not storage.exists(batch.record):
        for place in (batch.output, batch.errors):
            if storage.exists(place):
                raise ConfigError(f"{place} is there already, and not of a batch: delete it, or name another output")
        record = {"object": "batch", "status": IN_PROGRESS, "identity": identity}
        storage.write_json(batch.record, record)
        return record
    found: Json = storage.read_json(batch.record)
    then = found["identity"]
    changed = [f"{key} was {then.get(key)}, is {value}" for key, value in identity.items() if then.get(key) != value]
    if changed:
        raise ConfigError(
            f"{batch.record} is of another batch ({'; '.join(changed)}): go on as it was begun, or name another output"
        )
    return found


@contextmanager
def _alone(batch: Batch) -> Iterator[None]:
    """Keep other drivers of this batch out. In a bucket nothing does; two of them would do the same work twice.

    The lock is the kernel's, on the folder of parts: it ends with the process, however that ends.
    """
    if not storage.is_local(batch.parts):
        yield
        return
    folder = storage.local_path(batch.parts)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunInUse(f"another process works on {batch.output}: wait for it, or end it") from None
    finally:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()  # if nothing has been begun


def _work(
    batch: Batch,
    version: Version,
    given: Input,
    on_progress: Callable[[Counts, int], None],
    notice: Callable[[str], None],
) -> tuple[Counts, Counts]:
    """Have every part answered that is not; gives the counts of all, and of those that were."""
    done, counts = _done(batch), Counts()
    for number in done:
        with storage.open_file(_place(batch, number)) as file:
            counts += _counts(file.readline())
    before = counts
    on_progress(counts, given.lines)
    left = [part for part in given.parts if part.number not in done]
    if left:
        with closing(_answered(batch, version, left, notice)) as answered:
            for number, content in answered:
                storage.write_bytes(_place(batch, number), content)
                counts += _counts(content)
                on_progress(counts, given.lines)
    return counts, before


def _answered(
    batch: Batch, version: Version, parts: list[Part], notice: Callable[[str], None]
) -> Generator[tuple[int, bytes], None, None]:
    """The number and the result of each part, as they come; Ray Data gives the parts to actors that hold the model."""
    model = batch.model
    replicas, threads = min(batch.replicas, len(parts)), model.engine.threads or max(1, int(model.cpus))
    at_once = math.ceil(lines_at_once(model.engine) / PART_LINES) + 1  # one more, for the last lines of each part
    gpus = min(1, math.ceil(model.gpus))
    workers = WorkersConfig(count=replicas, cpus=model.cpus, gpus=gpus, start_timeout_s=batch.start_timeout_s)
    owns_ray = connect()
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, PlainRayHandler):  # not one that an application has added
            handler.setLevel(logging.ERROR)  # it talks of itself there; all of it goes into its log file as well
    try:
        with asking_for(workers):
            wait_for_room(workers, notice)
        rows = [{"part": pickle.dumps(part)} for part in parts]
        # A part is a block of its own: Ray Data hands results over block by block.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Answerer,
            fn_constructor_args=(
                batch.input,
                model.public_name,
                batch.unnamed or model.public_name,
                batch.registry,
                version.reference,
                model.engine,
                threads,
                model.adapters,
            ),
            compute=ray.data.ActorPoolStrategy(
                size=replicas, max_concurrent_calls_per_actor=at_once, max_tasks_in_flight_per_actor=at_once
            ),
            num_cpus=model.cpus,
            num_gpus=model.gpus or None,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},  # read when torch is loaded
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        # By whole blocks, and none ahead: a part is written as soon as it is there.
        for block in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in block.to_pylist():
                result = pickle.loads(row["result"])
                if isinstance(result, RaymodelsError):
                    raise result
                yield row["number"], result
    finally:
        if owns_ray:
            ray.shutdown()


def _done(batch: Batch) -> set[int]:
    """The numbers of the parts that are there."""
    return {int(name[:8]) for name in storage.list_names(batch.parts) if re.fullmatch(r"\d{8}\.jsonl", name)}


def _assemble(batch: Batch, given: Input, counts: Counts) -> None:
    """Write the outputs from the parts, in the order of the input."""
    if missing := {part.number for part in given.parts} - _done(batch):
        # In a bucket, where nothing keeps a second driver out, it may have been faster.
        raise RunInUse(f"{_place(batch, min(missing))} has gone: did another process work on {batch.output}?")
    with storage.create_stream(batch.output) as answers:
        for part in given.parts:
            completed, _ = _result(batch, part)
            answers.writelines(completed)
    if counts.failed:
        with storage.create_stream(batch.errors) as errors:
            for part in given.parts:
                _, failed = _result(batch, part)
                errors.writelines(failed)


def _result(batch: Batch, part: Part) -> tuple[list[bytes], list[bytes]]:
    """The lines of a part that were answered, and those that failed."""
    head, *lines = storage.read_bytes(_place(batch, part.number)).splitlines(keepends=True)
    counts = _counts(head)
    if not len(lines) == counts.completed + counts.failed == part.lines:
        place = _place(batch, part.number)
        raise IntegrityError(f"{place} holds {len(lines)} of {part.lines} lines: delete it, and run the batch again")
    return lines[: counts.completed], lines[counts.completed :]


def _counts(content: bytes) -> Counts:
    """What a part's first line says of the others."""
    return Counts(**json.loads(content.partition(b"\n")[0]))


def _place(batch: Batch, number: int) -> str:
    return storage.join(batch.parts, f"{number:08d}.jsonl")
