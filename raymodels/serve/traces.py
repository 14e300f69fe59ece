"""Traces of requests to replay: recorded ones, as JSON lines, and synthetic ones, as a shape and a seed.

A recorded trace has one line per request, in any order, of which these fields are read and others left alone:

    {"time": 1763812345.2, "prompt_tokens": 310, "completion_tokens": 120}

``time`` is in seconds from anywhere; the trace begins with its first request. ``requests`` says that a line stands for
so many like it; without it, for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymodels.errors import DataError

FIELDS = ("time", "prompt_tokens", "completion_tokens")
LONGEST_S = 366 * 86_400
QUIET = 0.05
"""What the quiet hours of a synthetic trace have of its peak."""


@dataclass(frozen=True)
class Trace:
    """What arrives in each second.

    Args:
        name: what it is called in tables and pictures.
        requests: arrivals, of shape [seconds].
        prompt_tokens: mean per request of that second, of shape [seconds].
        completion_tokens: mean per request of that second, of shape [seconds].
    """

    name: str
    requests: NDArray[np.int64]
    prompt_tokens: NDArray[np.float64]
    completion_tokens: NDArray[np.float64]


def read(path: Path) -> Trace:
    """A recorded trace.

    Raises:
        DataError: the file cannot be read, a line is no such object, or it spans more than a year; names the line.
    """
    rows = np.array(list(_rows(path)))
    if not len(rows):
        raise DataError(f"{path} holds no requests: a trace has a line such as {json.dumps(dict.fromkeys(FIELDS, 1))}")
    seconds = (rows[:, 0] - rows[:, 0].min()).astype(np.int64)
    if seconds.max() > LONGEST_S:
        raise DataError(f"{path} spans {seconds.max() / 86_400:,.0f} days: are all times in seconds?")
    count = np.bincount(seconds, rows[:, 3])
    prompt, completion = (
        np.bincount(seconds, rows[:, column] * rows[:, 3]) / np.maximum(count, 1) for column in (1, 2)
    )
    return Trace(path.stem, count.astype(np.int64), prompt, completion)


def synthetic(
    name: str, hours: float, peak_rate: float, prompt_tokens: float, completion_tokens: float, seed: int
) -> Trace:
    """A trace of one of the `SHAPES`: Poisson arrivals of at most ``peak_rate`` requests per second on average.

    The mean sizes of the requests vary by a tenth from second to second.
    """
    draw = np.random.default_rng(seed)
    rate = peak_rate * SHAPES[name](int(hours * 3600), draw)
    vary = np.clip(draw.normal(1.0, 0.1, (2, len(rate))), 0.5, 1.5)
    return Trace(name, draw.poisson(rate), prompt_tokens * vary[0], completion_tokens * vary[1])


def _step(seconds: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """Nothing for the first tenth, then the peak until two thirds of the time have passed, then nothing."""
    place = np.arange(seconds) / seconds
    return ((place >= 0.1) & (place < 2 / 3)).astype(float)


def _diurnal(seconds: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """A day: quiet at four in the morning, the peak at four in the afternoon, a slow random drift of a tenth."""
    day = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(seconds) / 86_400 - 4 / 24))
    hourly = draw.normal(0, 0.1, seconds // 3600 + 2)
    drift = np.interp(np.arange(seconds), 3600 * np.arange(len(hourly)), hourly)
    rate: NDArray[np.float64] = np.clip((QUIET + (1 - QUIET) * day) * (1 + drift), 0, 1)
    return rate


def _bursts(seconds: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """A quiet ground, and about once in half an hour a burst of one to ten minutes, of any height up to the peak."""
    rate = np.full(seconds, QUIET)
    for _ in range(max(1, draw.poisson(seconds / 1800))):
        begin, length = draw.integers(seconds), draw.integers(60, 600)
        rate[begin : begin + length] += draw.uniform(0.2, 1.0)
    return rate.clip(0, 1)


SHAPES: dict[str, Callable[[int, np.random.Generator], NDArray[np.float64]]] = {
    "bursts": _bursts,
    "diurnal": _diurnal,
    "step": _step,
}


def _rows(path: Path) -> Iterator[tuple[float, float, float, float]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        shapes = ", ".join(SHAPES)
        raise DataError(f"cannot read the trace {path}: {error}; give a file of JSON lines, or {shapes}") from error


def _row(line: str, where: str) -> tuple[float, float, float, float]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is no JSON object")
    time, prompt, completion, requests = (_number(found, field, where) for field in (*FIELDS, "requests"))
    return time, prompt, completion, requests


def _number(found: dict[str, Any], field: str, where: str) -> float:
    value = found.get(field, 1 if field == "requests" else None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise DataError(f"{where}: {field} must be a number from 0, not {json.dumps(value)}")
    return float(value)
