"""The access log: one line of JSON on stdout for every request. It holds no prompt, no answer and no key."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = "raymodels.access"


class JsonLines(logging.Formatter):
    """The fields of a record, after its time, as one line of JSON. Fields that are None are left out."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = {"time": time} | {name: value for name, value in fields.items() if value is not None}
        return json.dumps(line, separators=(",", ":"))


def open_log() -> logging.Logger:
    """The log, writing to this process's stdout and nowhere else."""
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
