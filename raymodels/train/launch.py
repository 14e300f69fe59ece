"""config -> a finished run: prepare the data, start the workers, follow them, publish the result."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.config import Config, changed_settings, difference, dump, from_yaml, to_yaml
from raymodels.data.dataset import Prepared
from raymodels.data.prepare import prepare
from raymodels.errors import AlreadyExists, ConfigError, Diverged, Stopped, StorageError
from raymodels.models.build import architecture
from raymodels.publish import publish
from raymodels.registry import PREFIX, Registry, Version
from raymodels.train import signals, zero
from raymodels.train.attempt import Evidence, run_attempt
from raymodels.train.controller import Kept
from raymodels.train.divergence import go_back
from raymodels.train.events import Event, Events
from raymodels.train.faults import classify, write_log
from raymodels.train.origin import starting_point
from raymodels.train.ownership import Owner
from raymodels.train.planner import preflight, relief

PAUSE_S = 1.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``metrics`` are the last known; ``phases`` are the start-up's seconds by name."""

    place: str
    prepared: Prepared
    checkpoint: layout.Checkpoint
    metrics: dict[str, float]
    phases: dict[str, float] = field(default_factory=dict)
    version: Version | None = None


def train(config: Config, on_event: Callable[[Event], None] | None = None) -> RunResult:
    """Run a config to its last step, from its newest committed checkpoint on if there is one.

    A run that is finished already is not run again; one that was interrupted continues.

    Args:
        on_event: is called with everything that goes into the run's ``events.jsonl``, as it happens.

    Raises:
        ConfigError: a setting cannot work, or the run directory belongs to another config; names the difference.
        RunInUse: another driver trains into the run directory, or has taken it over while this one was cut off.
        DataError: the source cannot be used.
        ClusterError: the cluster cannot hold the workers.
        TrainingError: a worker failed.
    """
    zero.deepspeed_config(config, config.workers.most)
    prepared = prepare_data(config, on_event)
    config = resolved(config)
    with (
        Owner(config.place, lambda: signals.request(config.place, events.attempt, "replaced")) as owner,
        Events(config.place, on_event) as events,
        Kept() as kept,
    ):
        _own(config, events)
        events(_described(prepared))
        preflight(config, events)
        found = layout.latest(config.place)
        finished = found is not None and found.step >= config.train.steps
        phases = {} if finished else _attempts(config, prepared, events, owner, kept)
        checkpoint = layout.open_checkpoint(config.place)
        assert checkpoint.step == config.train.steps, checkpoint
        version = publish(config, checkpoint) if config.publish else None
        metrics = checkpoint.state().metrics
        ending = {"place": config.place, "checkpoint": checkpoint.place, "metrics": metrics}
        events({"kind": "finished", **ending, "version": version.reference if version else None})
    return RunResult(config.place, prepared, checkpoint, metrics, phases, version)


def evaluate(config: Config, on_event: Callable[[Event], None] | None = None) -> dict[str, float]:
    """The held-out loss of a run's newest checkpoint, in nats per token, computed by the run's own kind of workers.

    Returns:
        ``step`` and ``eval_loss``.

    Raises:
        CheckpointError: the run has no committed checkpoint.
    """
    config = resolved(config)
    found = layout.open_checkpoint(config.place)
    _refuse_another(config)
    prepared = prepare_data(config, on_event)
    history = {"failures": 0, "seconds": 0.0, "started": time.time(), "resumed_from_step": found.step}
    evidence, on_event = Evidence(), on_event or _ignore
    try:
        with Kept() as kept:
            report = run_attempt(config, prepared.place, 0, history, on_event, evidence, kept, evaluate_only=True)
    except Exception as error:
        raise classify(error, evidence, config.retry, Counter()).error from error
    return {"step": report["step"], "eval_loss": report["eval_loss"]}


def resolved(config: Config) -> Config:
    """The config as every process of the run must read it: places absolute, a registry reference pinned to a number."""
    raw = dump(config)
    raw["run"]["storage"] = storage.absolute(config.run.storage)
    raw["data"]["prepared"] = storage.absolute(config.data.prepared)
    raw["registry"] = storage.absolute(config.registry)
    start = config.model.from_
    if start and start.startswith(PREFIX):
        raw["model"]["from"] = PREFIX + Registry(raw["registry"]).resolve(start).reference
    return Config.model_validate(raw)


def prepare_data(config: Config, on_event: Callable[[Event], None] | None = None) -> Prepared:
    """The config's prepared dataset, with the tokenizer of ``model.from`` where ``data.tokenizer`` is not set.

    Raises:
        DataError: the source or tokenizer cannot be used, or a split has no samples.
        ConfigError: the model that the config starts from does not fit the data.
        RegistryError: it names an unknown version.
    """
    config = resolved(config)

    def progress(done: int, total: int) -> None:
        (on_event or _ignore)({"kind": "preparing", "done": done, "total": total})

    source = starting_point(config)
    prepared = prepare(config, tokenizer_from=source.from_, progress=progress)
    # A model that does not fit the data is found here rather than on every worker.
    architecture(source, vocab_size=prepared.vocab_size, seq_len=config.data.seq_len, eos_id=prepared.eos_id)
    for split in ("train", "eval"):
        prepared.split(split, config.data.seq_len, config.data.pack)
    return prepared


def _described(prepared: Prepared) -> Event:
    return {
        "kind": "prepared",
        "place": prepared.place,
        "reused": prepared.reused,
        "fingerprint": prepared.fingerprint,
        "train_tokens": prepared.tokens("train"),
        "eval_tokens": prepared.tokens("eval"),
        "eval_unigram_entropy": prepared.unigram_entropy("eval"),
    }


def _attempts(config: Config, prepared: Prepared, events: Events, owner: Owner, kept: Kept) -> dict[str, float]:
    """Attempt after attempt until the last step is committed; returns the start-up's seconds of the first."""
    phases: dict[str, float] = {}
    failed_before: Counter[str] = Counter()
    while True:
        number, found = events.attempt + 1, _cleared(config, owner)
        if found is not None and found.step >= config.train.steps:
            return phases  # the attempt before had committed the last step when it failed
        workers, resumed = [config.workers.least, config.workers.most], found.step if found else 0
        events(
            {
                "kind": "started",
                "attempt": number,
                "resumed_from_step": resumed,
                "steps": config.train.steps,
                "workers": workers,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )
        account, evidence = events.account, Evidence()
        history = {"failures": account.restarts, "seconds": account.wall, "started": account.attempts[-1].started}
        history["resumed_from_step"] = resumed
        try:
            report = run_attempt(config, prepared.place, number, history, events, evidence, kept)
            left = report.get("left")
        except Exception as error:
            if evidence.committed:
                failed_before.clear()
            fault = classify(error, evidence, config.retry, failed_before)
            if fault.kind.startswith("out_of_memory"):
                fault = fault.advised(relief(config))
            write_log(config.place, number, fault)
            events(_failure(number, fault.kind, fault.cause, fault.remedy, fault.retry))
            if not fault.retry:
                raise fault.error from error
            if isinstance(fault.error, Diverged):
                owner.confirm()
                go_back(config.place, fault.error)
            failed_before[fault.kind] += 1
            continue
        phases = phases or report["phases"]
        if left is None:
            return phases
        if left == "replaced":
            raise owner.replaced()
        if left == "terminated":
            raise Stopped(f"asked to stop (SIGTERM) after step {report['step']}, which is committed: start it again")
        events(_failure(number, LEFT[left], f"left after step {report['step']}, having saved", "none needed", True))


def _cleared(config: Config, owner: Owner) -> layout.Checkpoint | None:
    """Clear up what the attempt before has left, and say from where the next one goes on.

    Storage that fails is tried again for ``checkpoint.retry_s``, as by a save: it may be what ended that attempt. A
    driver that another has replaced meanwhile touches nothing, as that one's saves look like remains.
    """
    deadline = time.monotonic() + config.checkpoint.retry_s
    while True:
        try:
            owner.confirm()
            signals.forget(config.place)
            layout.sweep(config.place)
            return layout.latest(config.place)
        except StorageError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_S)


# What the ledger calls the reasons for which workers leave early.
LEFT = {"preempted": "preemption", "resized": "resize"}


def _failure(number: int, fault: str, cause: str, remedy: str, retry: bool) -> Event:
    return {"kind": "failed", "attempt": number, "fault": fault, "cause": cause, "remedy": remedy, "retry": retry}


def _own(config: Config, events: Events) -> None:
    """Write the run's config.yaml, or see that the one there means the same."""
    place = storage.join(config.place, "config.yaml")
    try:
        storage.create(place, to_yaml(config).encode())
    except AlreadyExists:
        recorded = _refuse_another(config)
        if changed := changed_settings(recorded, config):
            events({"kind": "notice", "text": f"since the last start: {'; '.join(changed)}"})
            storage.write_bytes(place, to_yaml(config).encode())


def _refuse_another(config: Config) -> Config:
    place = storage.join(config.place, "config.yaml")
    recorded = from_yaml(storage.read_bytes(place).decode(), place)
    if changed := difference(recorded, config):
        raise ConfigError(
            f"run {config.run.name} in {config.run.storage} has another config ({'; '.join(changed)}): "
            "undo that, or give this one another run.name"
        )
    return recorded


def _ignore(event: Event) -> None:
    return None
