"""What one rank of a DeepSpeed engine holds of the training state, as pieces of whole parameters.

ZeRO cuts flattened parameters into partitions that depend on the stage and the number of ranks. Seen as *fragments*,
"elements 4,096 to 8,191 of lm_head.weight", the same state fits any stage and any number of ranks: whoever reads a
checkpoint takes from it the elements that it holds itself. Each fragment has three float32 tensors: the master weight
and AdamW's two moments. What DeepSpeed 0.19 keeps where:

    stage 0, fp32         the model's own parameters; every rank holds all, so each vouches for its share
    stage 0, bf16, fp16   float32 copies, one a parameter (FP16_UnfusedOptimizer); likewise
    stage 1, 2            a flat partition per parameter group, which a parameter may straddle (param._hp_mapping)
    stage 3               of every parameter an equal part, rounded up; flat per sub-group, perhaps swapped to NVMe
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of the flattened parameter ``name``, whose whole shape is ``shape``.

    ``tensors`` are views of the live state by kind, each float32 [numel].
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["master"].numel()


def fragments(engine: Any, *, write_back: bool = False) -> Iterator[Fragment]:
    """This rank's fragments. At stage 0 on every rank all of them, whole.

    Take what is needed of a fragment before asking for the next: state that lives on NVMe is in memory only so long.

    Args:
        write_back: keep what the caller writes into the tensors, also on NVMe.
    """
    stage = engine.zero_optimization_stage()
    return _stage0(engine) if stage == 0 else _stage3(engine, write_back) if stage == 3 else _stage12(engine)


def own_share(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    """The part of a fragment held by all ranks alike that one of them vouches for; perhaps empty."""
    begin, end = (fragment.numel * r // world_size for r in (rank, rank + 1))
    tensors = {kind: tensor[begin:end] for kind, tensor in fragment.tensors.items()}
    return Fragment(fragment.name, fragment.shape, fragment.start + begin, tensors)


def digest(fragment: Fragment) -> int:
    """A checksum modulo 2^64 that adds up: over any cutting of the state into fragments the sum is the same.

    Each element's 32 bits are multiplied by an odd number that depends on the parameter, the kind and the element's
    place, so that a changed, lost, repeated or misplaced element changes the sum (multilinear hashing: L. Carter and
    M. Wegman, "Universal classes of hash functions", J. Comput. Syst. Sci. 18, 1979).
    """
    total = 0
    for kind, tensor in fragment.tensors.items():
        salt = int.from_bytes(hashlib.sha256(f"{kind}/{fragment.name}".encode()).digest()[:7], "little") * 2 + 1
        for begin in range(0, tensor.numel(), CHUNK):
            bits = tensor[begin : begin + CHUNK].cpu().view(torch.int32).to(torch.int64)
            place = torch.arange(fragment.start + begin, fragment.start + begin + len(bits))
            total += int(((bits + 1) * _mixed(place, salt)).sum())  # so that a zero counts too
    return total % 2**64


def as_text(digests: int) -> str:
    """A sum of digests in hexadecimal."""
    return f"{digests % 2**64:016x}"


def _mixed(place: torch.Tensor, salt: int) -> torch.Tensor:
    """An odd 64-bit number for each place; products wrap around, as they should."""
    value = place * 0x1E3779B97F4A7C15 + salt
    value = (value ^ (value >> 29)) * 0x3F58476D1CE4E5B9
    return (value ^ (value >> 32)) | 1


def adam_step(engine: Any) -> int:
    """How many updates AdamW has made; fewer than optimizer steps where fp16 overflows were skipped."""
    optimizer = _adam(engine)
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return int(optimizer.param_groups[0].get("step", 0))


def set_adam_step(engine: Any, step: int) -> None:
    """Set it in every state that `fragments` has made or found."""
    optimizer = _adam(engine)
    for state in optimizer.state.values():
        if "exp_avg" in state:
            state["step"] = _count(optimizer, step)
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam
            group["step"] = step


def loss_scale(engine: Any) -> dict[str, float]:
    """The state of fp16's dynamic loss scaling; empty for other precisions."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)} if scaler else {}


def set_loss_scale(engine: Any, state: dict[str, float]) -> None:
    scaler = _scaler(engine)
    for name, value in state.items() if scaler else ():
        setattr(scaler, name, value)


def spread_masters(engine: Any) -> None:
    """Make the model's own weights those of the masters, on every rank. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for param, master in _copies(optimizer):
            param.data.copy_(master.data)
    elif stage == 3:
        for index in range(len(optimizer.fp16_groups)):
            with _swapped_in(optimizer, index, write_back=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:  # the small ones that ZeRO-3 keeps whole on every rank
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()


_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _count(optimizer: Any, step: int) -> Any:
    """A count of steps as the optimizer keeps it: torch's in a tensor, DeepSpeed's own as it is."""
    return torch.tensor(float(step)) if isinstance(optimizer, torch.optim.AdamW) else step


def _moments(optimizer: Any, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of one of its tensors, made as its first step would if it has not stepped yet."""
    state = optimizer.state[master]
    if "exp_avg" not in state:
        state["step"] = _count(optimizer, 0)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(master.data)
    return {kind: state[kind] for kind in MOMENTS}


def _stage0(engine: Any) -> Iterator[Fragment]:
    optimizer, adam = engine.optimizer, _adam(engine)
    masters = {id(param): master for param, master in _copies(optimizer)}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            master = masters.get(id(param), param)
            whole = {"master": master.data, **_moments(adam, master)}
            yield Fragment(name, tuple(param.shape), 0, {kind: t.view(-1) for kind, t in whole.items()})


def _copies(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Stage 0's parameters of low precision, each with its float32 copy; none in fp32."""
    for params, masters in zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    ):
        yield from zip(params, masters, strict=True)


def _stage12(engine: Any) -> Iterator[Fragment]:
    optimizer, adam = engine.optimizer, _adam(engine)
    for name, param in engine.module.named_parameters():
        here = getattr(param, "_hp_mapping", None)  # none of it may be on this rank
        if here is not None:
            flat = optimizer.optimizer.param_groups[here.param_group_index]["params"][0]
            part, within = here.lp_fragment_address, here.hp_fragment_address
            whole = {"master": flat.data, **_moments(adam, flat)}
            tensors = {kind: tensor.narrow(0, within.start, within.numel) for kind, tensor in whole.items()}
            yield Fragment(name, tuple(param.shape), part.start, tensors)


def _stage3(engine: Any, write_back: bool) -> Iterator[Fragment]:
    optimizer, adam = engine.optimizer, _adam(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    for index, group in enumerate(optimizer.fp16_groups):
        with _swapped_in(optimizer, index, write_back):
            flat = optimizer.fp32_partitioned_groups_flat[index]
            whole = {"master": flat.data, **_moments(adam, flat)}
            offset = 0
            for param in group:
                size = param.partition_numel()
                start = rank * size
                real = max(0, min(size, param.ds_numel - start))  # the last part is filled up
                if real:
                    tensors = {kind: tensor.narrow(0, offset, real) for kind, tensor in whole.items()}
                    yield Fragment(names[id(param)], tuple(param.ds_shape), start, tensors)
                offset += size


class _swapped_in:
    """One of ZeRO-3's sub-groups in memory, from NVMe if that is where it lives."""

    def __init__(self, optimizer: Any, index: int, write_back: bool) -> None:
        self.optimizer, self.index, self.write_back = optimizer, index, write_back
        self.swaps = optimizer._swappable_optimizer_subgroup(index)

    def __enter__(self) -> None:
        if self.swaps:
            self.optimizer._optimizer_states_and_gradient_swap_in(self.index)

    def __exit__(self, *_: object) -> None:
        if self.swaps and self.write_back:
            self.optimizer._optimizer_states_and_gradient_swap_out(self.index)
        elif self.swaps:
            self.optimizer._release_swap_buffers(self.index)
