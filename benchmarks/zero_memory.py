"""ZeRO is real: bytes of model state that each rank holds, measured, beside the formula of the ZeRO paper.

Mixed precision as in the paper (Rajbhandari et al., 2020, section 3.1): parameters and gradients in bf16, fp32 master
weights and two Adam moments. Measured are the storages of the tensors that DeepSpeed's engine holds after a backward
pass, each storage once.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.report import Bar, quick, report
from raymodels.config import Config, validate
from raymodels.testing import run_ranks

KINDS = ("parameters", "gradients", "optimizer")


def config(stage: int, workers: int, storage: str) -> Config:
    # DeepSpeed keeps small parameters whole on every rank to save messages; the formula knows no such exception.
    persistence = {"param_persistence_threshold": 0} if stage == 3 else {}
    return validate(
        {
            "run": {"name": "memory", "storage": storage},
            "data": {"source": "python-stdlib", "seq_len": 32},
            "model": {"arch": "llama", "hidden_size": 128, "layers": 16, "heads": 2},
            "train": {"steps": 2, "global_batch": 2 * workers, "micro_batch": 1, "lr": 1e-3, "precision": "bf16"},
            "zero": {"stage": stage, **persistence},
            "workers": {"count": workers},
        }
    )


def held_bytes(config: Config) -> dict[str, int]:
    """The most bytes of each kind that this rank holds after a backward pass of step 2; ``count``: parameters."""
    from raymodels.models.build import architecture
    from raymodels.train.engine import join_process_group, make_engine, make_model

    join_process_group()
    shape = architecture(config.model, vocab_size=4096, seq_len=32, eos_id=0)
    model = make_model(config, config.model, shape)
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine = make_engine(config, model)
    most = dict.fromkeys(KINDS, 0)
    for micro_step in range(4):  # two a step: ZeRO-1 holds whole gradients only until the last one of a step
        logits = engine(input_ids=torch.arange(32).unsqueeze(0)).logits
        engine.backward(logits.float().square().mean())
        if micro_step >= 2:  # the moments exist from the first step on
            most = {kind: max(most[kind], held) for kind, held in state_bytes(engine).items()}
        engine.step()
    return {**most, "count": count}


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes by kind of the model states that this rank's engine holds, each storage once."""
    parameters, gradients, optimizer = (_storages(tensors) for tensors in _held(engine))
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(size for key, size in gradients.items() if key not in parameters),
        "optimizer": sum(size for key, size in optimizer.items() if key not in parameters | gradients),
    }


def _held(engine: Any) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    parameters = list(engine.module.parameters())
    moments = (t for state in optimizer.state.values() for t in _tensors(state))
    if stage == 3:
        partitions = (p.ds_tensor for p in parameters)
        return (
            _chain(partitions, parameters),  # a parameter that is not gathered is empty
            _tensors(optimizer.grad_partitions_flat_buffer),
            _chain(moments, optimizer.fp32_partitioned_groups_flat),
        )
    gradients = (p.grad for p in parameters if p.grad is not None)
    if stage == 0:
        return iter(parameters), gradients, _chain(moments, getattr(optimizer, "fp32_groups", ()))
    return (
        iter(parameters),
        _chain(gradients, optimizer.averaged_gradients),
        _chain(moments, optimizer.single_partition_of_fp32_groups),
    )


def _chain(*nested: Any) -> Iterator[torch.Tensor]:
    for part in nested:
        yield from _tensors(part)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(nested.values())
    elif isinstance(nested, Iterable):
        for item in nested:
            yield from _tensors(item)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    found = (tensor.untyped_storage() for tensor in tensors if tensor.dim())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def formula(stage: int, workers: int, count: int) -> dict[str, float]:
    """Bytes by kind: 2, 2 and 12 a parameter, divided by the workers from stage 3, 2 and 1 on."""
    return {
        "parameters": 2 * count / (workers if stage >= 3 else 1),
        "gradients": 2 * count / (workers if stage >= 2 else 1),
        "optimizer": 12 * count / (workers if stage >= 1 else 1),
    }


def main() -> int:
    worlds = (1, 2) if quick() else (1, 2, 4)
    rows, errors, totals = [], [], {}
    with tempfile.TemporaryDirectory() as storage:
        for workers in worlds:
            for stage in range(4):
                ranks = run_ranks(held_bytes, workers, config(stage, workers, storage))
                expected = formula(stage, workers, ranks[0]["count"])
                row: dict[str, Any] = {"stage": stage, "workers": workers}
                for kind in KINDS:
                    most = max(rank[kind] for rank in ranks)
                    row |= {kind: most, f"{kind} (formula)": round(expected[kind])}
                    errors.append(abs(most - expected[kind]) / expected[kind])
                totals[stage, workers] = sum(row[kind] for kind in KINDS)
                rows.append({**row, "share of stage 0": round(totals[stage, workers] / totals[0, workers], 4)})
    bars = [Bar("worst_error", max(errors), "<=", 0.05)]
    if 4 in worlds:
        bars.append(Bar("stage3_on_4_of_stage0", totals[3, 4] / totals[0, 4], "<", 0.30))
    return report("zero_memory", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
