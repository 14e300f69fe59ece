"""The cheapest change of settings with which a config fits its device memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from raymodels.config import Config
from raymodels.train.planner.options import OFFLOADS, Subject, Way, own_way, ways

MOST_WORKERS = 4096


def cheapest_change(subject: Subject, config: Config) -> str | None:
    """The settings to change for the config to fit, cheapest first: a smaller micro batch costs no computation,
    a higher stage communication, activation checkpointing a third more computation, offloading transfers on every
    step, and more workers cost most."""
    for workers, way, checkpointing, micro_batch in _changes(config):
        changed = with_settings(config, workers=workers, checkpointing=checkpointing, micro_batch=micro_batch)
        if subject.option(changed, *way).fits:
            return _in_words(config, workers, way, checkpointing, micro_batch)
    return None


def _changes(config: Config) -> Iterator[tuple[int, Way, bool, int]]:
    train, own = config.train, own_way(config)
    workers = _doubled(config.workers.least, min(MOST_WORKERS, train.global_batch))
    micro_batches = sorted({max(1, train.micro_batch >> halvings) for halvings in range(20)}, reverse=True)
    checkpointing = sorted({train.activation_checkpointing, True})
    higher = [own, *(way for way in ways(config.workers.gpus > 0) if way > own)]
    found = product(workers, higher, checkpointing, micro_batches)
    yield from sorted(found, key=lambda c: (c[0], OFFLOADS.index(c[1][1]), c[2], c[1][0], -c[3]))


def _doubled(first: int, last: int) -> list[int]:
    numbers = [first]
    while numbers[-1] * 2 <= last:
        numbers.append(numbers[-1] * 2)
    return numbers


def _in_words(config: Config, workers: int, way: Way, checkpointing: bool, micro_batch: int) -> str:
    (stage, offload), (own_stage, own_offload) = way, own_way(config)
    train = config.train
    parts = [
        f"train.micro_batch {micro_batch}" if micro_batch != train.micro_batch else "",
        "train.activation_checkpointing true" if checkpointing != train.activation_checkpointing else "",
        f"zero.stage {stage}" if stage != own_stage else "",
        "zero.offload_optimizer.device cpu" if offload != OFFLOADS[0] and own_offload == OFFLOADS[0] else "",
        "zero.offload_params.device cpu" if offload == OFFLOADS[2] and own_offload != OFFLOADS[2] else "",
        f"workers.count {workers}" if workers != config.workers.least else "",
    ]
    return ", ".join(part for part in parts if part)


def with_settings(
    config: Config, *, workers: int, checkpointing: bool | None = None, micro_batch: int | None = None
) -> Config:
    train = config.train.model_copy(
        update={
            "micro_batch": micro_batch or config.train.micro_batch,
            "activation_checkpointing": config.train.activation_checkpointing
            if checkpointing is None
            else checkpointing,
        }
    )
    return config.model_copy(update={"train": train, "workers": config.workers.model_copy(update={"count": workers})})
