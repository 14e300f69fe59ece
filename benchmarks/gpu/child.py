"""The process of one part: ``python -m benchmarks.gpu.child MODULE:FUNCTION SHEET FOLDER cuda|cpu``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.sheet import Sheet


def main() -> None:
    target, sheet, folder, kind = sys.argv[1:]
    os.environ["DS_ACCELERATOR"] = kind  # DeepSpeed decides when it is imported
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(Machine(kind == "cuda", Path(folder)), Sheet(Path(sheet)))


if __name__ == "__main__":
    main()
