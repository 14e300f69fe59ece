"""Encoding texts beside the event loop: what is large is encoded in a thread, and what cannot fit is not.

The tokenizer gives up the interpreter's lock while it encodes. A prompt is first counted in pieces where it may be far
over the context, so that it costs no more than one that fits; the pieces of all prompts take turns.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from raymodels.serve.answers import token_name
from raymodels.serve.engine import QueueFull
from raymodels.serve.schema import Problem, Refused
from raymodels.serve.text import Text

T = TypeVar("T")

SMALL = 16 << 10
"""Characters that are encoded at once, on the event loop: a few milliseconds."""
PIECE = 32 << 10
"""Characters counted in one go."""
SLACK = 256
"""Tokens by which a piece may have more than its part of the whole: where a text is cut, a word may be."""
USUAL = 8
"""Characters per token that hardly any text has: what has fewer for the context is counted before it is encoded."""
PORTION = 10_000
"""Tokens turned into JSON in one go, which holds the interpreter's lock."""


@dataclass(frozen=True)
class Answered:
    """A tokenizer route's answer as JSON, and the tokens that it was made of."""

    body: bytes
    tokens: int


class Lane:
    """A thread that does one thing after the other.

    Args:
        most: callers that may wait for it.
    """

    def __init__(self, name: str, most: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._most = most
        self._held = 0

    async def run(self, work: Callable[..., T], *given: object) -> T:
        """What the work returns; raises as it, or `QueueFull`."""
        if self._held >= self._most:
            raise QueueFull("too many texts wait to be encoded: try again later")
        self._held += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)
        finally:
            self._held -= 1


class Encoder:
    """Encodes the prompts of a model.

    Args:
        context: most tokens of a prompt.
        held: prompts that may wait to be encoded.
    """

    def __init__(self, text: Text, context: int, held: int) -> None:
        self._text = text
        self._context = context
        self._prompts, self._others = Lane("prompts", held), Lane("tokenizing", held)

    async def aside(self, work: Callable[..., T], *given: object) -> T:
        """Prepare a prompt in the thread that encodes prompts; raises as `Lane.run`."""
        return await self._prompts.run(work, *given)

    async def prompts(self, texts: Iterable[str | list[int]], field: str, special: bool = True) -> list[list[int]]:
        """The token ids of each prompt; of one that is token ids itself, those.

        Raises:
            QueueFull: too many wait.
            Refused: 400, one is longer than the context; names the field.
        """
        given = list(texts)
        small = sum(len(each) for each in given if isinstance(each, str)) <= SMALL
        found = []
        for each in given:
            if isinstance(each, str):
                found.append(await self._prompt(each, field, special, small))
            elif len(each) > self._context:
                raise self._too_long(field, str(len(each)))
            else:
                found.append(each)
        return found

    async def tokenized(self, text: Callable[[], str], field: str, special: bool, names: bool) -> Answered:
        """The answer to ``POST /tokenize``, of a text that is made in the thread.

        Raises:
            QueueFull: too many wait.
            Refused: 400, there is no such text; names the field.
        """

        def answer() -> Answered:
            tokens = self._encode(text(), field, special)
            numbers = _array(tokens, lambda token: token)
            strings = _array(tokens, lambda token: token_name(self._text.raw(token))) if names else "null"
            sizes = f'"count":{len(tokens)},"max_model_len":{self._context}'
            return Answered(f'{{{sizes},"tokens":{numbers},"token_strs":{strings}}}'.encode(), len(tokens))

        return await self._others.run(answer)

    async def detokenized(self, tokens: list[int], check: Callable[[list[int], str], None]) -> Answered:
        """The answer to ``POST /detokenize``, special tokens included; raises as the check, or `QueueFull`."""

        def answer() -> Answered:
            check(tokens, "tokens")
            return Answered(json.dumps({"prompt": self._text.decode(tokens, special=True)}).encode(), len(tokens))

        return await self._others.run(answer)

    async def _prompt(self, text: str, field: str, special: bool, small: bool) -> list[int]:
        if small:
            return self._encode(text, field, special)
        await self._check(text, field)
        return await self._prompts.run(self._encode, text, field, special)

    async def _check(self, text: str, field: str) -> None:
        """Refuse what is over the context for certain, without encoding all of it."""
        fewest = self._text.fewest(text)
        if fewest > self._context:
            raise self._too_long(field, f"{fewest} or more")
        if len(text) <= USUAL * self._context:
            return
        counted = 0
        for number, at in enumerate(range(0, len(text), PIECE), 1):
            counted += await self._prompts.run(self._text.count, text[at : at + PIECE])
            if counted - number * SLACK > self._context:
                raise self._too_long(field, f"{counted - number * SLACK} or more")

    def _encode(self, text: str, field: str, special: bool) -> list[int]:
        try:
            return self._text.encode(text, add_special_tokens=special)
        except UnicodeEncodeError as error:
            message = f"{field} holds a lone surrogate, which is no character: {error.reason}"
            raise Refused(Problem(status=400, message=message, param=field)) from error

    def _too_long(self, field: str, tokens: str) -> Refused:
        message = f"the prompt's {tokens} tokens are over the context of {self._context} tokens: shorten it"
        return Refused(Problem(status=400, message=message, param=field, code="context_length_exceeded"))


def _array(tokens: list[int], shown: Callable[[int], int | str]) -> str:
    portions = (tokens[at : at + PORTION] for at in range(0, len(tokens), PORTION))
    parts = (json.dumps([shown(token) for token in portion], separators=(",", ":"))[1:-1] for portion in portions)
    return f"[{','.join(parts)}]"
