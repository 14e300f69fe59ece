"""Offload: optimizer and parameters in the host's memory or on a disk, with the losses of training without it."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.machine import SMALL, Machine, forget, join_process_group, prepared
from benchmarks.gpu.parts.losses import worst
from benchmarks.gpu.sheet import Sheet

STEPS, BOUND = 3, 1e-4
HOST = {"device": "cpu"}
WAYS: dict[str, dict[str, Any]] = {
    "stage 2, optimizer to the host": {"stage": 2, "offload_optimizer": HOST},
    "stage 3, optimizer and parameters to the host": {"stage": 3, "offload_optimizer": HOST, "offload_params": HOST},
}


def measure(machine: Machine, sheet: Sheet) -> None:
    join_process_group(machine)
    expected = losses(machine, "none", {"stage": 2})
    nvme = {"device": "nvme", "path": str(machine.folder / "nvme")}
    ways = WAYS | {"stage 3, optimizer to a disk": {"stage": 3, "offload_optimizer": nvme}}
    for name, zero in ways.items():
        if "nvme" in str(zero) and (hindrance := no_async_io()):
            sheet.not_run(name, hindrance)
            continue
        with sheet.guarded(name):
            # DeepSpeed's own AdamW for CPUs is compiled at its first use, which takes two cores a minute and a half.
            own = {} if machine.cuda else {"raw": {"zero_force_ds_cpu_optimizer": False}}
            found = losses(machine, name.replace(",", "").replace(" ", "-"), zero | own)
            note = "" if machine.cuda else "with torch's AdamW, which need not be compiled"
            sheet.bar(f"{name}: losses off", worst(found, expected), "<=", BOUND, note)
        forget(machine)


def no_async_io() -> str:
    """Why DeepSpeed cannot write to a disk by itself here; empty where it can."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    return "" if builder.is_compatible() else "libaio's headers are missing: install libaio-dev"


def losses(machine: Machine, name: str, zero: dict[str, Any]) -> list[float]:
    from raymodels.testing import train_here

    train = {"steps": STEPS + 1, "global_batch": 4, "micro_batch": 2, "warmup_steps": 1}
    seq_len = 256 if machine.cuda else 64
    config = machine.config(f"offload-{name}", machine.size(SMALL), seq_len, train, zero=zero)
    session, reports = train_here(config, prepared(config), until=STEPS)
    del session
    return [report["loss"] for report in reports]
