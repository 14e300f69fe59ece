"""config -> a finished run: prepare the data, start the workers, follow them, publish the result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from raymodels import storage
from raymodels.checkpoint import layout
from raymodels.cluster import connect, wait_for_room
from raymodels.config import Config, difference, dump, from_yaml, to_yaml
from raymodels.data.dataset import Prepared
from raymodels.data.prepare import prepare
from raymodels.errors import AlreadyExists, ConfigError, RaymodelsError, TrainingError
from raymodels.models.build import architecture
from raymodels.publish import publish
from raymodels.registry import PREFIX, Registry, Version
from raymodels.train import zero
from raymodels.train.events import Event, Events
from raymodels.train.origin import starting_point
from raymodels.train.relay import relay
from raymodels.train.worker import work


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
        DataError: the source cannot be used.
        ClusterError: the cluster cannot hold the workers.
        TrainingError: a worker failed.
    """
    zero.deepspeed_config(config)
    prepared = prepare_data(config, on_event)
    config = resolved(config)
    _own(config)
    with Events(config.place, on_event) as events:
        events(_described(prepared))
        phases: dict[str, float] = {}
        found = layout.latest(config.place)
        if found is None or found.step < config.train.steps:
            layout.sweep(config.place)
            events({"kind": "started", "resumed_from_step": found.step if found else 0, "steps": config.train.steps})
            phases = _fit(config, prepared, events, evaluate_only=False).get("phases", {})
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
    layout.open_checkpoint(config.place)
    _refuse_another(config)
    report = _fit(config, prepare_data(config, on_event), on_event or _ignore, evaluate_only=True)
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


def _own(config: Config) -> None:
    """Write the run's config.yaml, or see that the one there means the same."""
    try:
        storage.create(storage.join(config.place, "config.yaml"), to_yaml(config).encode())
    except AlreadyExists:
        _refuse_another(config)


def _refuse_another(config: Config) -> None:
    place = storage.join(config.place, "config.yaml")
    recorded = from_yaml(storage.read_bytes(place).decode(), place)
    if changed := difference(recorded, config):
        raise ConfigError(
            f"run {config.run.name} in {config.run.storage} has another config ({'; '.join(changed)}): "
            "undo that, or give this one another run.name"
        )


def _fit(config: Config, prepared: Prepared, on_event: Callable[[Event], None], *, evaluate_only: bool) -> Event:
    """Run the workers to their end; returns everything they reported, later values over earlier ones."""
    connect()
    wait_for_room(config.workers, lambda text: on_event({"kind": "notice", "text": text}))
    merged: Event = {}

    def on_report(report: Event) -> None:
        merged.update(report)
        on_event({"kind": "report", **report})

    # A process of Ray's that tells of preemptions, to which nothing listens yet.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    job = {"config": dump(config), "prepared": prepared.place, "started": time.time(), "evaluate_only": evaluate_only}
    with relay(on_report) as callback:
        trainer = TorchTrainer(
            work,
            train_loop_config=job,
            torch_config=TorchConfig(
                backend="nccl" if config.workers.gpus else "gloo", timeout_s=int(config.workers.collective_timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=config.workers.count,
                use_gpu=config.workers.gpus > 0,
                resources_per_worker={"CPU": config.workers.cpus, "GPU": config.workers.gpus},
            ),
            run_config=RunConfig(
                name=f"start-{int(time.time() * 1000)}",  # ours resumes, not Ray's
                storage_path=storage.join(config.place, "ray"),
                failure_config=FailureConfig(max_failures=0),
                callbacks=[callback],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        except SystemExit as error:  # how Ray Train's own handler of Ctrl-C leaves, having ended the workers
            raise KeyboardInterrupt from error
    return merged


def _cause(error: TrainingFailedError) -> RaymodelsError:
    """Our own error where a worker raised one, else the first failed rank's traceback."""
    if not isinstance(error, WorkerGroupError):
        return TrainingError(str(error))
    rank, failure = min(error.worker_failures.items())
    for failure in error.worker_failures.values():
        original = getattr(failure, "_base_exc", failure)
        if isinstance(original, RaymodelsError):
            return original
    return TrainingError(f"rank {rank} failed: {failure}")


def _ignore(event: Event) -> None:
    return None
