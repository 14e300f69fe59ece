"""What a config takes with each way to spread its model states, given the memory that its workers have."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from raymodels.config import Config, ModelConfig, TokenizerConfig
from raymodels.data import tokenizer
from raymodels.models.build import DTYPES, architecture, construct, flops_per_token
from raymodels.train.origin import starting_point
from raymodels.train.planner.memory import Memory, Setting, Weights, communication, deepspeed_estimate, memory
from raymodels.train.planner.trace import Pass, trace

OFFLOADS = ("none", "optimizer", "optimizer+params")
# What to have beyond the peak: allocators fragment, and libraries hold memory of their own. On a GPU that is CUDA's
# context and NCCL, on CPU the interpreter with its libraries.
MARGIN = 1.1
RESERVED = {True: 2 * 2**30, False: 2**30}

Way = tuple[int, str]  # ZeRO stage, offload


@dataclass(frozen=True)
class Option:
    """One way to spread the model states over the workers.

    Attributes:
        needed: bytes of device memory to have: the peak with a margin, and what the libraries take.
        states: bytes of device memory without which not even the model states fit.
        communication: bytes that one rank sends in one step.
        deepspeed_estimate: model states by DeepSpeed's own accounting, to compare; it has one for stages 2 and 3.
        fits: none where the device memory is not known.
    """

    stage: int
    offload: str
    memory: Memory
    needed: float
    states: float
    communication: float
    deepspeed_estimate: float | None
    fits: bool | None

    @property
    def name(self) -> str:
        return f"stage {self.stage}" + ("" if self.offload == "none" else f" with offload of {self.offload}")

    @property
    def price(self) -> tuple[int, float, float]:
        """Sorts options by what they cost: offloading slows most, then communication; then the memory itself."""
        return OFFLOADS.index(self.offload), self.communication, self.needed


def ways(on_gpu: bool) -> list[Way]:
    """The stages and what each can offload; on CPU workers there is no other memory to offload to."""
    offloads = {0: 1, 1: 2, 2: 2, 3: 3}
    return [(stage, offload) for stage in range(4) for offload in OFFLOADS[: offloads[stage] if on_gpu else 1]]


def own_way(config: Config) -> Way:
    """How the config itself spreads the states."""
    optimizer, params = (o.device != "none" for o in (config.zero.offload_optimizer, config.zero.offload_params))
    return config.zero.stage, OFFLOADS[2] if params else OFFLOADS[1] if optimizer else OFFLOADS[0]


class Subject:
    """The model of a config, built without its weights, and what it takes."""

    def __init__(self, config: Config, device_memory: float | None) -> None:
        source = starting_point(config)
        self.shape = architecture(source, vocab_size=vocabulary(config, source), seq_len=config.data.seq_len, eos_id=0)
        with torch.device("meta"):
            model = construct(self.shape, DTYPES[config.train.precision])
            model.tie_weights()
        sizes = tuple(parameter.numel() for parameter in model.parameters())
        self.weights = Weights(sizes, DTYPES[config.train.precision].itemsize)
        self.largest_layer = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
        self.flops_per_token = flops_per_token(self.shape, self.weights.count, config.data.seq_len)
        self.device_memory = device_memory

    def passed(self, config: Config, checkpointing: bool | None = None) -> Pass:
        """A pass of the config's micro batch."""
        train = config.train
        return trace(
            self.shape,
            kind=config.task.kind,
            batch=train.micro_batch,
            tokens=config.data.seq_len,
            precision=train.precision,
            checkpointing=train.activation_checkpointing if checkpointing is None else checkpointing,
            masked=not config.data.pack,
        )

    def option(self, config: Config, stage: int, offload: str) -> Option:
        """What the config takes if it spreads its states this way; its own ``zero.stage`` and offload do not matter."""
        on_gpu = config.workers.gpus > 0
        setting = Setting(
            stage=stage,
            offload_optimizer=offload != OFFLOADS[0],
            offload_params=offload == OFFLOADS[2],
            workers=config.workers.least,
            accumulation=config.accumulation(config.workers.least),
            on_gpu=on_gpu,
            zero=config.zero,
        )
        held = memory(self.weights, setting, self.passed(config))
        # On CPU workers the host is the device, and so holds what is offloaded and the copy that a save writes from.
        beside = 0.0 if on_gpu else held.host
        needed = (held.peak + (0.0 if on_gpu else held.snapshot)) * MARGIN + RESERVED[on_gpu]
        return Option(
            stage,
            offload,
            memory=held,
            needed=needed,
            states=held.states + beside,
            communication=communication(self.weights, setting),
            deepspeed_estimate=deepspeed_estimate(self.weights, self.largest_layer, setting) if stage >= 2 else None,
            fits=None if self.device_memory is None else needed <= self.device_memory,
        )


@functools.cache
def _loaded_vocabulary(source: str, setting: str) -> int:
    return tokenizer.load(source, setting).vocab_size


def vocabulary(config: Config, source: ModelConfig) -> int:
    """Token ids: of the tokenizer that is named, or as many as a new one is to have.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    settings = config.data.tokenizer
    if settings and settings.from_:
        return _loaded_vocabulary(settings.from_, "data.tokenizer.from")
    if settings is None and source.from_:
        return _loaded_vocabulary(source.from_, "model.from")
    return (settings or TokenizerConfig()).vocab_size
