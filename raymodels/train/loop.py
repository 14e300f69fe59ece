"""What a worker does, from top to bottom. It needs a torch.distributed process group and nothing of Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raymodels.checkpoint import layout
from raymodels.checkpoint.restore import restore_newest
from raymodels.checkpoint.save import Saver
from raymodels.config import Config
from raymodels.data.batches import Batch, fill_up, micro_batches
from raymodels.data.dataset import Split, open_prepared
from raymodels.data.order import digest, sample_ids, shard
from raymodels.errors import StorageError, TrainingError
from raymodels.models.build import architecture, flops_per_token, parameter_count
from raymodels.tasks import Task, task
from raymodels.train.divergence import Divergence, dropped
from raymodels.train.engine import join_process_group, make_engine, make_model, own_loss_scale, read_assets
from raymodels.train.interval import Interval
from raymodels.train.meter import Meter, Phases, peak_memory_bytes
from raymodels.train.origin import starting_point
from raymodels.train.schedule import learning_rate
from raymodels.train.signals import REASONS, Reason, Signals

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
    policy: Divergence
    saver: Saver
    flops_per_token: float


def open_session(
    config: Config, prepared_place: str, phases: Phases, warn: Callable[[str], None], known: int = 0
) -> Session:
    """Everything a rank needs to train or evaluate, restored from the newest whole checkpoint. Collective.

    Args:
        prepared_place: what `raymodels.data.prepare.prepare` made.
        phases: of the start-up so far; the ones measured here are added.
        warn: is told of checkpoints that were damaged and left out.
        known: the step of the newest checkpoint that the driver sees, or 0.
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
        assets = read_assets(shape, prepared.tokenizer_dir)
    with phases("engine"):
        engine = make_engine(config, model)
    with phases("restore"):
        state = restore_newest(engine, config.place, warn, known) or _state(config, prepared.fingerprint, 0, 0, {}, {})
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
        policy=Divergence(config.train, dropped(config.place), state.divergence),
        saver=Saver(engine, config, assets),
        flops_per_token=flops_per_token(shape, parameter_count(shape), seq_len),
    )


def train(session: Session, phases: Phases, report: Report, signals: Signals, interval: Interval) -> Reason | None:
    """Train to the last step, or until asked to leave. Collective.

    Args:
        report: is called equally often on every rank, with the metrics that this rank knows.

    Returns:
        Why it left early, having saved unless it was replaced; None at the end of the run.

    Raises:
        StorageError: the last checkpoint could not be saved.
        Diverged: the loss is no number, or too high for too long.
    """
    config, settings, begin = session.config, session.config.train, session.state.step
    meter, tokens, metrics = Meter(session.flops_per_token), session.state.tokens, dict(session.state.metrics)
    samples: list[str] = []
    for step in range(begin, settings.steps):
        first, done, phases.step = step == begin, step + 1, step
        with phases("first_step" if first else "step"), meter.step() as timed:
            taken = optimizer_step(session, step, phases, Votes(interval.due(done, time.monotonic()), signals.heard()))
            timed.tokens = taken.weight
        start_up = phases.start_up() if first else {}
        tokens += taken.weight
        samples.append(taken.samples)
        session.saver.fed(step, taken.samples)
        if taken.weight:  # else its batch was dropped
            decision = session.policy.judge(step, taken.loss, taken.grad_norm)
            if decision.action != "go_on":
                with phases("blocked_by_save"):
                    session.saver.wait(phases.going_on)  # for a checkpoint from before this step
                raise decision.error()
            metrics |= {"loss": taken.loss, "grad_norm": taken.grad_norm}

        mine = taken.leave != "replaced"  # where another driver has taken over, the checkpoints are its own
        last = mine and (done == settings.steps or taken.leave is not None)
        evaluate_now = done == settings.steps or done % config.eval.every == 0
        save_now = last or (mine and taken.save)
        if not (evaluate_now or save_now or first or taken.leave or done % settings.report_every == 0):
            continue
        metrics |= {"learning_rate": learning_rate(settings, step), **meter.read()}
        if evaluate_now:
            with phases("evaluation"):
                metrics["eval_loss"] = evaluate(session, phases)
        if save_now:
            with phases("blocked_by_save") as blocked:
                session.saver.save(
                    _state(config, session.fingerprint, done, tokens, metrics, session.policy.memory()), phases.going_on
                )
            interval.saved(time.monotonic(), blocked())
            if last:
                with phases("blocked_by_save"):
                    session.saver.wait(phases.going_on)
        saved = session.saver.outcomes()
        for outcome in saved:
            interval.written(outcome.seconds)
        report(
            metrics
            | {
                "step": done,
                "tokens": tokens,
                "samples": samples,
                "world_size": dist.get_world_size(),
                "memory_bytes": peak_memory_bytes(session.device),
                "saves": [vars(outcome) for outcome in saved],
                "at": time.time(),
                "seconds": phases.take(),
                "left": taken.leave,
            }
            | ({"phases": start_up} if start_up else {})
        )
        samples = []
        if last and saved[-1].error:
            raise StorageError(f"the last checkpoint was not saved: {saved[-1].error}")
        if taken.leave:
            return taken.leave
    return None


@dataclass(frozen=True)
class Votes:
    """What a rank would have all do after a step. Rank 0's ``save`` and anybody's ``leave`` decide."""

    save: bool = False
    leave: Reason | None = None


@dataclass(frozen=True)
class Taken:
    """One optimizer step as taken by all ranks. ``weight`` is 0 if its batch was dropped.

    ``loss`` is the mean over the global batch. ``samples`` is the digest of the sample ids that were really fed, in
    hexadecimal; see `raymodels.data.order.digest`.
    """

    loss: float
    weight: int
    grad_norm: float
    samples: str
    save: bool
    leave: Reason | None


def optimizer_step(session: Session, step: int, phases: Phases, votes: Votes) -> Taken:
    """Optimizer step ``step``. Collective.

    DeepSpeed averages gradients over ranks, so a summed loss times ranks / global weight gives the gradient of the
    global weighted mean, however the global batch is cut into ranks and micro batches. What the ranks must agree on
    travels with the weight.
    """
    config, engine, objective = session.config, session.engine, session.objective
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with phases("data"):
        ids = sample_ids(config.run.seed, step, config.train.global_batch, len(session.samples))
        if session.policy.drops(step):
            ids = ids[:0]
        mine, places = shard(ids, rank, world_size)
        filled = fill_up(mine, config.train.micro_batch, config.accumulation(world_size))
        batches = _on(session.device, micro_batches(session.samples, filled, config.train.micro_batch))
    with phases("weigh"):
        mine_weighs = sum(map(objective.weight, batches))
        weight, samples, save, leave = _agree(session, mine_weighs, digest(mine, places), votes)
    if not weight:
        return Taken(math.nan, 0, 0.0, f"{samples:016x}", save, leave)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, step)
    torch.manual_seed((config.run.seed << 32) + step * world_size + rank)  # of dropout
    total, scale = torch.zeros((), device=session.device), own_loss_scale(engine)
    for batch in batches:
        with phases.own() if config.zero.stage < 3 else nullcontext():  # stage 3 gathers parameters on the way
            loss = objective.loss(engine, batch)
        engine.backward(loss * (world_size * scale / weight), scale_wrt_gas=False)
        unpartitioned = config.zero.stage == 0 and config.train.precision == "fp32"
        plain_norm = _plain_grad_norm(engine) if unpartitioned else None
        engine.step()
        total += loss.detach()
    with phases("settle"):  # here a GPU's host waits for it
        norm = float(engine.get_global_grad_norm() if plain_norm is None else plain_norm) / scale
        mean = summed(total, session.device) / weight
    return Taken(mean, weight, norm, f"{samples:016x}", save, leave)


def _agree(session: Session, weight: int, samples: int, votes: Votes) -> tuple[int, int, bool, Reason | None]:
    """The sum of the weights and of the digests (modulo 2^64), and what was decided."""
    leave = [int(votes.leave == reason) for reason in REASONS]
    mine = [weight, samples - (samples >> 63 << 64), int(votes.save and dist.get_rank() == 0), *leave]
    agreed = torch.tensor(mine, dtype=torch.int64, device=session.device)
    dist.all_reduce(agreed)
    total, samples, save, *leave = agreed.tolist()
    decided = next((reason for reason, votes in zip(REASONS, leave, strict=True) if votes), None)
    return total, samples % 2**64, bool(save), decided


@torch.no_grad()
def evaluate(session: Session, phases: Phases) -> float:
    """The mean loss over the held-out samples (the first ``eval.samples``, or all), in nats. Collective."""
    config, split, device = session.config, session.held_out, session.device
    rank, world_size, micro_batch = dist.get_rank(), dist.get_world_size(), config.train.micro_batch
    count = min(len(split), config.eval.samples or len(split))
    # Every rank must run equally many forward passes, so the last ones are filled up with samples of weight 0.
    mine, _ = shard(np.arange(count), rank, world_size)
    filled = fill_up(mine, micro_batch, -(-count // (micro_batch * world_size)))
    loss, weight = torch.zeros((), device=device), 0
    session.engine.eval()
    for batch in _on(device, micro_batches(split, filled, micro_batch)):
        phases.going_on()
        loss += session.objective.loss(session.engine, batch)
        weight += session.objective.weight(batch)
    session.engine.train()
    return summed(loss, device) / summed(weight, device)


def _on(device: torch.device, batches: Iterable[Batch]) -> list[Batch]:
    return [{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]


def _plain_grad_norm(engine: Any) -> float:
    """The norm at ZeRO stage 0 in fp32, where DeepSpeed clips without telling it."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def summed(value: torch.Tensor | float, device: torch.device) -> float:
    """The sum over all ranks, in double precision."""
    total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return float(total)


def _state(
    config: Config, fingerprint: str, step: int, tokens: int, metrics: dict[str, float], divergence: dict[str, Any]
) -> layout.State:
    return layout.State(
        step=step,
        tokens=tokens,
        world_size=dist.get_world_size(),
        zero_stage=config.zero.stage,
        precision=config.train.precision,
        config_digest=config.digest(),
        data_fingerprint=fingerprint,
        metrics=dict(metrics),
        divergence=divergence,
    )


def _same_data(state: layout.State, fingerprint: str) -> None:
    if state.data_fingerprint != fingerprint:
        raise TrainingError(
            f"the prepared data changed since step {state.step} (fingerprint {state.data_fingerprint[:12]} -> "
            f"{fingerprint[:12]}): restore the source, or train under another run.name"
        )
