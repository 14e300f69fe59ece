"""Which tokens of a choice may be sent with the text that is certain. The same for every engine."""

from __future__ import annotations

from dataclasses import replace

from raymodels.serve.engine import Token
from raymodels.serve.text import TextStream


def released(unsent: list[Token], stream: TextStream, finished: bool) -> tuple[Token, ...]:
    """Take those off that may go: with the first character of their text; not one that a stop string cut off whole."""
    whole = finished and not stream.stopped
    ready = [token for token in unsent if whole or token.offset < stream.released]
    del unsent[: len(ready)]
    return tuple(ready)


def placed(stream: TextStream, prompt: list[Token]) -> tuple[Token, ...]:
    """The next tokens of a prompt with their offsets; ``stream`` follows the prompt from its beginning."""
    found = []
    for token in prompt:
        found.append(replace(token, offset=stream.decoded))
        stream.push(token.id)
    return tuple(found)
