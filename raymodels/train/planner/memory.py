"""What one rank holds at most, by ZeRO stage and offload: DeepSpeed's allocations, as arithmetic.

The shares of the model states are the ZeRO paper's (Rajbhandari et al., 2020, section 3); what DeepSpeed 0.19 holds
beside them (buckets, gathered parameters, copies while it updates) was read from its source and measured against it
by ``benchmarks/planner_accuracy.py``. All sizes are bytes of one rank, except where they say elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from raymodels.config import ZeroConfig
from raymodels.train.planner.trace import Pass

MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 weights and Adam's two moments
FP32 = 4
# Elements, where the config leaves them to DeepSpeed.
BUCKET, PREFETCH, MAX_LIVE, MAX_REUSE, SUB_GROUP, PERSISTENT = 500_000_000, 50_000_000, 10**9, 10**9, 10**9, 100_000
STAGE0_BUCKET = 500_000_000  # the engine's own all-reduce takes no setting


@dataclass(frozen=True)
class Weights:
    """A model's parameters: elements of each, and bytes of one element in training."""

    sizes: tuple[int, ...]
    itemsize: int

    @cached_property
    def count(self) -> int:
        return sum(self.sizes)

    @cached_property
    def largest(self) -> int:
        return max(self.sizes)


@dataclass(frozen=True)
class Setting:
    """How the states are spread.

    Attributes:
        on_gpu: whether workers have a GPU; then offloaded states lie in another memory than the rest.
        accumulation: micro batches in one step.
    """

    stage: int
    offload_optimizer: bool
    offload_params: bool
    workers: int
    accumulation: int
    on_gpu: bool
    zero: ZeroConfig


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds.

    Attributes:
        parameters, gradients, optimizer: model states on the device. The optimizer's include the fp32 weights.
        host: what offloading keeps in the host's memory.
        buffers: buckets and gathered parameters, while a pass runs.
        update: copies that the optimizer's step makes.
        snapshot: the host's copy of this rank's part of a checkpoint, which is written while training goes on.
        peak: the most held at once; states, and activations with buffers or the update's copies. On CPU workers
            the host is the device, so ``host`` is in it.
    """

    parameters: float
    gradients: float
    optimizer: float
    host: float
    buffers: float
    update: float
    snapshot: float
    peak: float

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def memory(weights: Weights, setting: Setting, passed: Pass) -> Memory:
    """What a rank holds, given what a pass of its micro batch does."""
    share = _share(weights, setting)
    parameters, gradients, optimizer = _states(weights, setting, share)
    host = _host(weights, setting, share)
    bucket = _bucket(weights, setting)
    gathered, in_flight = _gathered(weights, setting)
    buffers = bucket + gathered + in_flight

    def held(made: int) -> float:
        return _gradients_held(weights, setting, share, made)

    fixed = parameters + optimizer
    passing = fixed + bucket + gathered + passed.peak(held, forward=held(0) + in_flight)
    update = _update(weights, setting, share)
    stepping = fixed + min(gradients, weights.itemsize * share) + update
    peak = max(passing, stepping, fixed + _at_the_end_of_backward(weights, setting, share) + bucket)
    if not setting.on_gpu:
        peak += host
    snapshot = MASTER_AND_MOMENTS * weights.count / setting.workers
    return Memory(parameters, gradients, optimizer, host, buffers, update, snapshot, peak)


def deepspeed_estimate(weights: Weights, largest_layer: int, setting: Setting) -> float:
    """Bytes of model states on the device by the accounting of DeepSpeed's documentation ("Memory Requirements").

    It counts 16-bit gradients as whole until they are reduced (stage 3: the largest layer's, with its weights), and
    fp32 gradients beside the fp32 weights and moments; what is offloaded counts nothing. It knows no activations, no
    buckets and no update. Here for comparison: `memory` is the planner's own answer.

    Args:
        largest_layer: elements of the largest module.
    """
    share = _share(weights, setting)
    kept = 0 if setting.offload_optimizer else (MASTER_AND_MOMENTS + FP32) * share
    if setting.stage == 3:
        partition = 0 if setting.offload_params else weights.itemsize * share
        return 2 * weights.itemsize * largest_layer + partition + kept
    whole = weights.itemsize * weights.count
    return whole + (0 if setting.offload_optimizer else whole) + kept


def communication(weights: Weights, setting: Setting) -> float:
    """Bytes that one rank sends in one optimizer step, with ring collectives (ZeRO paper, section 7).

    An all-gather or a reduce-scatter sends (workers - 1) / workers of the model, an all-reduce twice that. DeepSpeed
    reduces gradients once a step at stages 0 and 1, once a micro batch at stages 2 and 3; stages 1 and 2 all-reduce
    and then gather the updated parameters; stage 3 gathers for forward and for backward. ZeRO++ is not counted.
    """
    once = weights.itemsize * weights.count * (setting.workers - 1) / setting.workers
    return once * {0: 2, 1: 3, 2: 2 * setting.accumulation + 1, 3: 3 * setting.accumulation}[setting.stage]


def _share(weights: Weights, setting: Setting) -> float:
    """Elements of the partition that this rank updates."""
    return weights.count / (setting.workers if setting.stage else 1)


def _states(weights: Weights, setting: Setting, share: float) -> tuple[float, float, float]:
    """Parameters, gradients and optimizer states on the device between two micro batches."""
    item, whole = weights.itemsize, weights.itemsize * weights.count
    master = MASTER_AND_MOMENTS if setting.stage or item < FP32 else MASTER_AND_MOMENTS - FP32  # stage 0, fp32: no copy
    optimizer = 0.0 if setting.offload_optimizer else master * share
    if setting.stage < 3:
        gradients = whole if setting.stage < 2 else item * share
        return whole, 0.0 if setting.offload_optimizer and setting.stage == 2 else gradients, optimizer
    partition = 0.0 if setting.offload_params else item * share
    return partition + _persistent(weights, setting), 0.0 if setting.offload_optimizer else item * share, optimizer


def _persistent(weights: Weights, setting: Setting) -> float:
    """Stage 3 keeps small parameters whole."""
    most = _or(setting.zero.param_persistence_threshold, PERSISTENT)
    small = sum(size for size in weights.sizes if size <= most)
    return weights.itemsize * small * (setting.workers > 1)


def _host(weights: Weights, setting: Setting, share: float) -> float:
    """Offloaded: fp32 weights, moments and gradients, and a pinned 16-bit buffer of the partition; parameters."""
    optimizer = (MASTER_AND_MOMENTS + FP32 + weights.itemsize) * share if setting.offload_optimizer else 0.0
    return optimizer + (weights.itemsize * share if setting.offload_params else 0.0)


def _bucket(weights: Weights, setting: Setting) -> float:
    """The buffer that gradients are reduced from; on CPU only what is written to it takes memory."""
    if setting.stage == 0 or setting.zero.contiguous_gradients is False:
        return 0.0
    elements = _or(setting.zero.reduce_bucket_size, BUCKET)
    doubled = 2 if setting.stage < 3 and setting.zero.overlap_comm else 1
    return weights.itemsize * doubled * (elements if setting.on_gpu else min(elements, weights.count))


def _gathered(weights: Weights, setting: Setting) -> tuple[float, float]:
    """Stage 3: bytes of whole parameters beside the persistent ones, and of all-gathers that are not unpacked yet.

    Parameters stay while they are used again within max_reuse_distance, counted forth to the loss and back, and are
    fetched ahead up to max_live_parameters.
    """
    if setting.stage < 3 or setting.workers == 1:
        return 0.0, 0.0
    zero, partitioned = setting.zero, weights.count - _persistent(weights, setting) / weights.itemsize
    live = max(_or(zero.max_live_parameters, MAX_LIVE), _or(zero.max_reuse_distance, MAX_REUSE) / 2) + weights.largest
    ahead = _or(zero.prefetch_bucket_size, PREFETCH)
    return weights.itemsize * min(partitioned, live), weights.itemsize * min(partitioned, ahead)


def _gradients_held(weights: Weights, setting: Setting, share: float, made: int) -> float:
    """Bytes held for gradients once a pass has made so many bytes of them."""
    item, earlier = weights.itemsize, setting.accumulation > 1
    if setting.stage < 2:
        return float(item * weights.count if earlier else made)
    in_reduction = min(made, _reduced_at_once(weights, setting))
    partition = 0.0 if setting.offload_optimizer else item * share
    if setting.stage == 2:
        # The rank whose partition is last in the model gets all of its gradients first.
        return partition * earlier + min(made, partition) + in_reduction
    return partition + in_reduction


def _reduced_at_once(weights: Weights, setting: Setting) -> float:
    """The copy that gradients are reduced in: of a full bucket, or of one parameter that is larger."""
    bucket = min(_or(setting.zero.reduce_bucket_size, BUCKET), weights.count)
    return weights.itemsize * max(bucket, weights.largest)


def _at_the_end_of_backward(weights: Weights, setting: Setting, share: float) -> float:
    """Gradients with the copies they are reduced through, when no activations are left."""
    item, whole = weights.itemsize, weights.itemsize * weights.count
    if setting.stage == 0:
        return whole + item * min(weights.count, STAGE0_BUCKET)
    if setting.stage == 1:
        return whole + item * share + _reduced_at_once(weights, setting)
    return _gradients_held(weights, setting, share, whole)


def _update(weights: Weights, setting: Setting, share: float) -> float:
    """Copies that AdamW's step makes: fp32 gradients, and its own temporaries.

    On the GPU torch's AdamW takes all tensors together and makes one copy, on CPU one tensor at a time and makes two.
    """
    if setting.offload_optimizer:
        return 0.0
    if setting.stage == 0:
        temporaries = FP32 * weights.count if setting.on_gpu else 2 * FP32 * weights.largest
        return temporaries + (FP32 * weights.count if weights.itemsize < FP32 else 0.0)
    at_once = min(share, _or(setting.zero.sub_group_size, SUB_GROUP)) if setting.stage == 3 else share
    copies = FP32 * at_once * (2 if setting.on_gpu else 3)
    return copies - (_persistent(weights, setting) if setting.stage == 3 else 0.0)  # those are not whole meanwhile


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
