"""Kubernetes' amounts, such as 500m, 1.5 and 8Gi, as numbers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?")
SCALES = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), None: Decimal(1), "": Decimal(1)}
SCALES |= {unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)}
SCALES |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)}


def amount(quantity: Any) -> Decimal | None:
    """A quantity as a number of its base unit; None where it is none.

    Syntax: apimachinery's ``resource.Quantity``.
    """
    found = FORM.fullmatch(str(quantity)) if isinstance(quantity, (str, int, float)) else None
    if found is None:
        return None
    number, unit, exponent = found.groups()
    return Decimal(number) * SCALES[unit] * Decimal(10) ** int(exponent or 0)
