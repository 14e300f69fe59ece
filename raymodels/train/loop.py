"""What a worker does, from top to bottom. It needs a torch.distributed process group and nothing of Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raymodels.checkpoint import layout
from raymodels.checkpoint.save import restore, save
from raymodels.config import Config
from raymodels.data.batches import NOBODY, Batch, micro_batches
from raymodels.data.dataset import Split, open_prepared
from raymodels.data.order import sample_ids, shard
from raymodels.errors import TrainingError
from raymodels.models.build import architecture, flops_per_token, parameter_count
from raymodels.tasks import Task, task
from raymodels.train.engine import join_process_group, make_engine, make_model, write_assets
from raymodels.train.meter import Meter, Phases, peak_memory_bytes
from raymodels.train.origin import starting_point
from raymodels.train.schedule import learning_rate

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Session:
    """One rank's part of a run, ready for step ``state.step``."""

    config: Config
    device: torch.device
    objective: Task
    fingerprint: str
    samples: Split
    held_out: Split
    engine: Any
    state: layout.State
    assets: Path
    flops_per_token: float


def open_session(config: Config, prepared_place: str, local_rank: int, phases: Phases) -> Session:
    """Everything a rank needs to train or evaluate, restored from the newest committed checkpoint. Collective.

    Args:
        prepared_place: what `raymodels.data.prepare.prepare` made.
        local_rank: this process's place on its host, which is also its GPU.
        phases: of the start-up so far; the ones measured here are added.
    """
    seq_len = config.data.seq_len
    with phases("data"):
        prepared = open_prepared(prepared_place)
        samples, held_out = (prepared.split(name, seq_len, config.data.pack) for name in ("train", "eval"))
    with phases("model"):
        join_process_group()
        source = starting_point(config)
        shape = architecture(source, vocab_size=prepared.vocab_size, seq_len=seq_len, eos_id=prepared.eos_id)
        model = make_model(config, source, shape)
        assets = write_assets(shape, prepared.tokenizer_dir)
    with phases("engine"):
        engine = make_engine(config, model)
    with phases("restore"):
        found = layout.latest(config.place)
        state = restore(engine, found, local_rank) if found else _state(config, prepared.fingerprint, 0, 0, {})
        _same_data(state, prepared.fingerprint)
    return Session(
        config=config,
        device=engine.device,
        objective=task(config.task.kind),
        fingerprint=prepared.fingerprint,
        samples=samples,
        held_out=held_out,
        engine=engine,
        state=state,
        assets=assets,
        flops_per_token=flops_per_token(shape, parameter_count(shape), seq_len),
    )


def train(session: Session, phases: Phases, report: Report) -> None:
    """Train to the last step. Collective.

    Args:
        report: is called equally often on every rank, with the metrics that this rank knows.
    """
    config, settings, begin = session.config, session.config.train, session.state.step
    meter, tokens, metrics = Meter(session.flops_per_token), session.state.tokens, dict(session.state.metrics)
    for step in range(begin, settings.steps):
        first, done, last = step == begin, step + 1, step + 1 == settings.steps
        with phases("first_step") if first else nullcontext(), meter.step() as timed:
            loss, weight, grad_norm = optimizer_step(session, step)
            timed.tokens = int(weight)
        tokens += int(weight)

        evaluate_now = last or done % config.eval.every == 0
        save_now = last or done % config.checkpoint.every == 0
        if not (evaluate_now or save_now or first or done % settings.report_every == 0):
            continue
        metrics |= {"loss": _summed(loss, session.device) / weight, **meter.read()}
        metrics |= {"learning_rate": learning_rate(settings, step), "grad_norm": grad_norm}
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(f"the loss is {metrics['loss']} at step {done}: lower train.lr or raise warmup_steps")
        if evaluate_now:
            metrics["eval_loss"] = evaluate(session)
        news: dict[str, Any] = {"step": done, "tokens": tokens, "memory_bytes": peak_memory_bytes(session.device)}
        if save_now:
            state = _state(config, session.fingerprint, done, tokens, metrics)
            news["checkpoint"] = save(session.engine, config.place, state, session.assets, config.checkpoint.keep).place
        if first:
            news["phases"] = phases.seconds
        report(metrics | news)


def optimizer_step(session: Session, step: int) -> tuple[torch.Tensor, float, float]:
    """Optimizer step ``step``; returns this rank's summed losses, the global batch's weight and the gradient norm.

    DeepSpeed averages gradients over ranks, so a summed loss times ranks / global weight gives the gradient of the
    global weighted mean, however the global batch is cut into ranks and micro batches.
    """
    config, engine, objective = session.config, session.engine, session.objective
    ids = sample_ids(config.run.seed, step, config.train.global_batch, len(session.samples))
    mine = shard(ids, dist.get_rank(), dist.get_world_size())
    batches = _on(session.device, micro_batches(session.samples, mine, config.train.micro_batch))
    weight = _summed(sum(objective.weight(batch) for batch in batches), session.device)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, step)
    torch.manual_seed((config.run.seed << 32) + step * dist.get_world_size() + dist.get_rank())  # of dropout
    total = torch.zeros((), device=session.device)
    for batch in batches:
        loss = objective.loss(engine, batch)
        engine.backward(loss * (dist.get_world_size() / weight), scale_wrt_gas=False)
        unpartitioned = config.zero.stage == 0 and config.train.precision == "fp32"
        plain_norm = _plain_grad_norm(engine) if unpartitioned else None
        engine.step()
        total += loss.detach()
    return total, weight, float(engine.get_global_grad_norm() if plain_norm is None else plain_norm)


@torch.no_grad()
def evaluate(session: Session) -> float:
    """The mean loss over the held-out samples (the first ``eval.samples``, or all), in nats. Collective."""
    config, split, device = session.config, session.held_out, session.device
    rank, world_size, micro_batch = dist.get_rank(), dist.get_world_size(), config.train.micro_batch
    count = min(len(split), config.eval.samples or len(split))
    # Every rank must run equally many forward passes, so the last ones are filled up with samples of weight 0.
    ids = np.full(-(-count // (micro_batch * world_size)) * micro_batch * world_size, NOBODY, dtype=np.int64)
    ids[:count] = np.arange(count)
    loss, weight = torch.zeros((), device=device), 0
    session.engine.eval()
    for batch in _on(device, micro_batches(split, shard(ids, rank, world_size), micro_batch)):
        loss += session.objective.loss(session.engine, batch)
        weight += session.objective.weight(batch)
    session.engine.train()
    return _summed(loss, device) / _summed(weight, device)


def _on(device: torch.device, batches: Iterable[Batch]) -> list[Batch]:
    return [{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]


def _plain_grad_norm(engine: Any) -> float:
    """The norm at ZeRO stage 0 in fp32, where DeepSpeed clips without telling it."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def _summed(value: torch.Tensor | float, device: torch.device) -> float:
    """The sum over all ranks, in double precision."""
    total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return float(total)


def _state(config: Config, fingerprint: str, step: int, tokens: int, metrics: dict[str, float]) -> layout.State:
    return layout.State(
        step=step,
        tokens=tokens,
        world_size=dist.get_world_size(),
        zero_stage=config.zero.stage,
        precision=config.train.precision,
        config_digest=config.digest(),
        data_fingerprint=fingerprint,
        metrics=dict(metrics),
    )


def _same_data(state: layout.State, fingerprint: str) -> None:
    if state.data_fingerprint != fingerprint:
        raise TrainingError(
            f"the prepared data changed since step {state.step} (fingerprint {state.data_fingerprint[:12]} -> "
            f"{fingerprint[:12]}): restore the source, or train under another run.name"
        )
