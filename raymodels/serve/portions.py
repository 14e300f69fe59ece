"""A long answer as several messages: each is written and read at once, while nothing else goes on in its process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raymodels.serve.engine import Delta

PORTION = 64
"""Tokens in one message. With 20 alternatives each it takes milliseconds to write, in which nothing else goes on."""


def portions(deltas: list[Delta]) -> Iterator[list[Delta]]:
    """The same deltas in lists of about `PORTION` tokens, where one with more is several."""
    portion: list[Delta] = []
    size = 0
    for delta in (part for each in deltas for part in _parts(each)):
        portion.append(delta)
        size += 1 + len(delta.prompt) + len(delta.tokens)
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _parts(delta: Delta) -> Iterator[Delta]:
    """A delta as several with `PORTION` tokens at most; all else that it holds comes with the last one."""
    before = replace(delta, text="", finish=None, prompt=(), tokens=(), embedding=())
    for begin in range(0, len(delta.prompt) - PORTION, PORTION):
        yield replace(before, prompt=delta.prompt[begin : begin + PORTION])
    prompt = delta.prompt[-(len(delta.prompt) % PORTION or PORTION) :]
    for begin in range(0, len(delta.tokens) - PORTION, PORTION):
        yield replace(before, prompt=prompt, tokens=delta.tokens[begin : begin + PORTION])
        prompt = ()
    yield replace(delta, prompt=prompt, tokens=delta.tokens[-(len(delta.tokens) % PORTION or PORTION) :])
