"""Constrained decoding: which tokens may come next for a text to match a JSON schema or a grammar. By llguidance."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher

from raymodels.serve import grammar_rules
from raymodels.serve.engine import Grammar, InvalidRequest
from raymodels.serve.grammar_compiler import Compiled, Compiler
from raymodels.serve.grammar_rules import NO_TEXT, Unusable
from raymodels.serve.text import Text


class Grammars:
    """Compiles grammars for one tokenizer, in threads and a process of its own, which begin with the first grammar.

    Args:
        vocabulary: columns of the model's logits; there may be more of them than tokens, or less.
    """

    def __init__(self, text: Text, vocabulary: int) -> None:
        self._text, self._vocabulary = text, vocabulary
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None

    async def compile(self, grammar: Grammar) -> Compiled:
        """The grammar compiled, as `matcher` takes it.

        Raises:
            InvalidRequest: it cannot be compiled, or takes too long or too much memory; says why.
            QueueFull: the machine is too busy to tell.
        """
        return await asyncio.wrap_future(self._started().compile(grammar))

    def compile_now(self, grammar: Grammar) -> Compiled:
        """The same for who can wait meanwhile."""
        return grammar if isinstance(grammar, Compiled) else self._started().compile(grammar).result()

    async def faults(self, grammars: Sequence[Grammar]) -> list[str | None]:
        """Why each cannot be compiled, or none where it can. What is not judged in `FAULTS_S` is `LATE`."""
        return await asyncio.wrap_future(self._started().faults(grammars))

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new text's matcher, of a compiled grammar."""
        assert isinstance(grammar, Compiled)
        return Matcher(grammar.matcher.deep_copy(), self._vocabulary)

    def close(self) -> None:
        """End the threads and the process."""
        with self._lock:
            if self._compiler:
                self._compiler.close()
            self._compiler = None

    def _started(self) -> Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = Compiler(self._text, self._vocabulary)
            return self._compiler


class Matcher:
    """Follows one text through its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        """The row of logits, shape (vocabulary,), with those of forbidden tokens at minus infinity.

        Raises:
            InvalidRequest: the grammar cannot be followed any further; says why.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary]).bool()
        if not allowed.any():
            raise _unfollowed(NO_TEXT)
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, id: int) -> bool:
        """Go on by a token; true once nothing can follow. Raises as `forbid`."""
        self._matcher.consume_token(id)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        try:
            grammar_rules.check(self._matcher)
        except Unusable as error:
            raise _unfollowed(str(error)) from None


def _unfollowed(why: str) -> InvalidRequest:
    return InvalidRequest(f"the grammar cannot be followed any further: {why}", "grammar")
