"""A plan for people to read."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from raymodels.train.planner.plan import Plan, gigabytes

COLUMNS = (
    *("stage", "offload", "parameters", "gradients", "optimizer", "buffers", "update", "peak", "needed"),
    *("on the host", "sent a step", "fits", ""),
)


def summary(plan: Plan) -> dict[str, Any]:
    """What does not depend on how the states are spread, and what is advised."""
    known, best = plan.device_memory is not None, plan.recommended
    return {
        "parameters": f"{plan.parameters:,}",
        "workers": plan.workers,
        "device memory": gigabytes(plan.device_memory or 0) if known else "not known",
        "activations": f"{gigabytes(plan.activations)}, checkpointed {gigabytes(plan.activations_checkpointed)}",
        "model FLOPs a step": f"{plan.flops:.3g}",
        "checkpoint": f"{gigabytes(plan.checkpoint)}, {plan.checkpoint_seconds:,.1f} s to write",
        "this config": plan.chosen.name + {True: ", fits", False: ", does not fit", None: ""}[plan.chosen.fits],
        "recommended": f"{best.name}: {plan.reason}" if best else plan.reason,
    }


def table(plan: Plan) -> Table:
    """One row for each stage and offload; sizes in GB of one worker."""
    rows = Table(*COLUMNS, box=None, title="GB of one worker", title_justify="left")
    for option in plan.options:
        held = option.memory
        sizes = (held.parameters, held.gradients, held.optimizer, held.buffers, held.update, held.peak, option.needed)
        note = "this config" if option is plan.chosen else ""
        if option is plan.recommended:
            note = ", ".join(filter(None, (note, "recommended")))
        rows.add_row(
            str(option.stage),
            option.offload,
            *(f"{size / 1e9:,.2f}" for size in (*sizes, held.host + held.snapshot, option.communication)),
            {True: "yes", False: "no", None: "-"}[option.fits],
            note,
        )
    return rows
