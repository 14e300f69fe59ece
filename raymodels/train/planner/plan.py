"""What a run will take, before it runs: memory for every way to spread it, communication, FLOPs, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from raymodels.config import Config
from raymodels.errors import ConfigError
from raymodels.train.planner.change import cheapest_change
from raymodels.train.planner.memory import MASTER_AND_MOMENTS
from raymodels.train.planner.options import OFFLOADS, Option, Subject, own_way, ways


@dataclass(frozen=True)
class Plan:
    """What a config takes; sizes are bytes.

    Attributes:
        parameters: elements of the whole model, tied ones counted once.
        device_memory: of a worker; none where it is not known.
        activations, activations_checkpointed: what the forward pass of one micro batch keeps for the backward pass,
            without and with activation checkpointing.
        flops: floating-point operations of one step, over all workers; recomputed activations are not counted.
        checkpoint: one checkpoint's fp32 weights and moments, ``checkpoint_seconds`` to write.
        options: every ZeRO stage and offload; ``chosen`` is the config's own.
        recommended: the cheapest option that fits, ``reason`` says why; none where none fits, or nothing is known.
        change: the cheapest settings with which the config fits, where it does not and there are any.
    """

    parameters: int
    workers: int
    device_memory: float | None
    activations: float
    activations_checkpointed: float
    flops: float
    checkpoint: float
    checkpoint_seconds: float
    options: tuple[Option, ...]
    chosen: Option
    recommended: Option | None
    reason: str
    change: str | None

    def must_fit(self) -> None:
        """
        Raises:
            ConfigError: the config needs more than the device memory; names the cheapest change that fits.
        """
        if self.chosen.fits is False:
            raise ConfigError(self.shortage())

    def shortage(self) -> str:
        """Why the config does not fit, and the remedy, in a line."""
        assert self.device_memory is not None
        remedy = (
            f"set {self.change}"
            if self.change
            else "no number of workers helps; lower data.seq_len or the model's size"
        )
        return (
            f"{self.chosen.name} on {self.workers} workers needs {gigabytes(self.chosen.needed)} of memory a worker, "
            f"there are {gigabytes(self.device_memory)}: {remedy}"
        )


def plan(config: Config, device_memory: float | None = None, storage_bandwidth: float = 1e9) -> Plan:
    """Plan a run on its least number of workers, where each holds the most. No weights are allocated.

    Args:
        device_memory: bytes that a worker has; default: ``workers.device_memory``.
        storage_bandwidth: bytes a second that storage takes from all workers together.

    Raises:
        ConfigError: the model cannot be read, or does not fit the tokenizer.
        DataError: the tokenizer cannot be loaded.
    """
    device_memory = device_memory or config.workers.device_memory
    subject = Subject(config, device_memory)
    own = own_way(config)
    all_ways = ways(config.workers.gpus > 0)
    options = {way: subject.option(config, *way) for way in [*all_ways, *([own] if own not in all_ways else [])]}
    chosen = options[own]
    recommended = min((option for option in options.values() if option.fits), key=lambda o: o.price, default=None)
    checkpoint = MASTER_AND_MOMENTS * subject.weights.count
    return Plan(
        parameters=subject.weights.count,
        workers=config.workers.least,
        device_memory=device_memory,
        activations=subject.passed(config, checkpointing=False).kept,
        activations_checkpointed=subject.passed(config, checkpointing=True).kept,
        flops=subject.flops_per_token * config.data.seq_len * config.train.global_batch,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint / storage_bandwidth,
        options=tuple(options.values()),
        chosen=chosen,
        recommended=recommended,
        reason=_reason(tuple(options.values()), recommended),
        change=cheapest_change(subject, config) if chosen.fits is False else None,
    )


def gigabytes(size: float) -> str:
    """In powers of ten, as memory is sold."""
    return f"{size / 1e9:,.2f} GB"


def _reason(options: tuple[Option, ...], best: Option | None) -> str:
    if options[0].fits is None:
        return "the device memory is not known: set workers.device_memory"
    if best is None:
        return "nothing fits"
    without = "" if best.offload == OFFLOADS[0] else "nothing fits without offload; "
    why = f"{without}it sends the least of those that fit, {gigabytes(best.communication)} a step"
    cheaper = [option for option in options if option.price < best.price]
    return why + "".join(f"; {option.name} needs {gigabytes(option.needed)}" for option in cheaper[-1:])
