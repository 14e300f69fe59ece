"""What the control plane has to do with at any size, made as the project itself makes it: a registry, a run's record,
checkpoints, a routing table, what Serve shows an autoscaling policy, what the watch sees of all ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingContext

from raymodels import manifest
from raymodels.checkpoint import layout, shards, tensors
from raymodels.checkpoint.fragments import KINDS, Fragment
from raymodels.registry import Registry
from raymodels.serve.routing import Route
from raymodels.train.heartbeat import RECENT, Beat
from raymodels.train.relay import fullest

PARAMETERS = 291
"""Of a Llama of 7 B: 32 layers of 9, and 3."""
MONTH_S, STEP_S, REPORT_EVERY, RESTARTS = 30 * 86400, 10.0, 10, 116
"""A month of steps of 10 s. Restarts: 419 in 54 days on 16,384 GPUs (Llama 3, 2024, section 3.3.4), for 8,000 GPUs."""


def fill_registry(place: Path, models: int, versions: int) -> Registry:
    """Versions that `Registry.publish` has written once; the others are copies of their small files."""
    registry = Registry(str(place))
    source = place.parent / "model"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"weights")
    first = Path(registry.publish("m0000", str(source), {"metrics": {"eval_loss": 2.5}}, alias="prod").place)
    shutil.rmtree(first / "model")  # listing reads none of it
    for number in range(2, versions + 1):
        shutil.copytree(first, first.with_name(str(number)))
        registry.set_alias("m0000", "prod", number)
    for number in range(1, models):
        shutil.copytree(place / "m0000", place / f"m{number:04}", copy_function=copy_or_link)
    return registry


def copy_or_link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def record(folder: Path, months: float, ranks: int) -> str:
    """The events of a run as train writes them; the driver's own start and end, and a line a report."""
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: run}\n")
    reports = int(months * MONTH_S / STEP_S / REPORT_EVERY)
    now, step = 1.7e9, 0
    with (run / "events.jsonl").open("w") as file:
        for number in range(reports):
            if number % max(1, reports // max(1, int(RESTARTS * months))) == 0:
                attempt = {"kind": "started", "attempt": number + 1, "resumed_from_step": max(0, step - 5)}
                step = max(0, step - 5)
                print(
                    json.dumps({"time": now, "driver": 1, **attempt, "steps": 10**6, "host": "h", "pid": 1}), file=file
                )
            step, now = step + REPORT_EVERY, now + STEP_S * REPORT_EVERY
            print(json.dumps({"time": now, "driver": 1, **told(step, now, ranks)}), file=file)
        print(json.dumps({"time": now, "driver": 1, "kind": "finished"}), file=file)
    return str(folder)


def told(step: int, now: float, ranks: int) -> dict[str, Any]:
    """A report as the relay passes it on."""
    figures = {"loss": 2.123456789, "grad_norm": 0.123456789, "learning_rate": 0.0003, "step_seconds": STEP_S}
    rates = {"tokens_per_second": 12345678.9, "model_flops_per_second": 1.23456789e18}
    digests = [hashlib.sha256(str(step + i).encode()).hexdigest()[:16] for i in range(REPORT_EVERY)]
    seconds = {"data": 0.5, "step": 98.0, "blocked_by_save": 0.4, "other": 1.1}
    held = fullest([76_543_210_987 + rank for rank in range(ranks)])
    rest = {"world_size": ranks, "memory_bytes": held, "saves": [], "at": now, "seconds": seconds, "left": None}
    return {"kind": "report", "step": step, "tokens": step * 10**8, "samples": digests, **figures, **rates, **rest}


def checkpoint(folder: Path, ranks: int) -> str:
    place = layout.step_place(str(folder), 50)
    Path(place, layout.ZERO).mkdir(parents=True)
    for rank in range(ranks):
        Path(place, shards.file_name(rank, ranks, "00000000")).write_bytes(b"fragments of rank %d" % rank)
    return place


def table(models: int) -> dict[str, Route]:
    return {f"m{n:04}": Route({f"m{n:04}--v1": 0.9, f"m{n:04}--v2": 0.1}, shadow=f"m{n:04}--v3") for n in range(models)}


def context(number: int) -> AutoscalingContext:
    """What Serve's controller shows the policy of one model with two replicas."""
    figures = {"load_running": 3.0, "load_queued": 1.0, "load_requests_per_s": 2.0, "load_full_tokens_per_s": 400.0}
    figures |= {"load_tokens_per_request": 100.0, "load_held": 0.0, "load_held_tokens": 0.0, "load_ttft_p95_s": 0.2}
    raw = {name: {r: [TimeStampedValue(99.0, value)] for r in ("a", "b")} for name, value in figures.items()}
    return AutoscalingContext(
        deployment_id=None,
        deployment_name=f"m{number:04}",
        app_name=None,
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[],
        total_num_requests=8.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=100.0,
        config=None,
    )


def beats(ranks: int, **one: Any) -> list[Beat]:
    """All ranks in the same all-reduce, silent for a minute, with full rings of steps; ``one`` changes rank 7's."""
    everyone = []
    for rank in range(ranks):
        ring = tuple(10.0 + ((rank * 31 + i * 17) % 97) / 1000 for i in range(RECENT))
        place = {"host": f"h{rank // 8}", "node": f"n{rank // 8}", "rank": rank, "world_size": ranks, "pid": rank}
        where = {"phase": "weigh", "step": 99, "within": 0, "marks": 500, "quiet": 600.0, "silent": 0.1}
        times = {"seconds": ring, "own": ring, "longest": {"weigh": 1.0, "save": 2.0}, "status": "running"}
        fields = {**place, "thread": rank, "born": 0.0, **where, **times}
        everyone.append(Beat(**{**fields, **(one if rank == 7 else {})}))
    return everyone


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)


def zero_3_checkpoint(folder: Path, ranks: int) -> str:
    """A committed one in which every rank's file has a piece of every parameter, of one element."""
    place, entries = layout.step_place(str(folder), 50), {}
    Path(place, layout.ZERO).mkdir(parents=True)
    for rank in range(ranks):
        file = shards.file_name(rank, ranks, "00000000")
        one = dict.fromkeys(KINDS, torch.zeros(1))
        held = [Fragment(f"layers.{n}.weight", (ranks,), rank, one) for n in range(PARAMETERS)]
        flat = {f"{kind}/{each.name}": tensor for each in held for kind, tensor in each.tensors.items()}
        Path(place, file).write_bytes(b"".join(map(bytes, tensors._pieces(flat, shards.metadata(held)))))
        entries[file] = manifest.Entry(size=Path(place, file).stat().st_size, sha256="0" * 64)
    manifest.commit(place, entries)
    return place
