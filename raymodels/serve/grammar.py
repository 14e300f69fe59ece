"""Constrained decoding: which tokens may come next for a text to match a JSON schema or a grammar. By llguidance."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from raymodels.serve.engine import Grammar, InvalidRequest
from raymodels.serve.text import Text

# JSON allows white space without end, and some models would write nothing else. So it is written as most write it.
JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
KEPT = 64
"""Compiled grammars that are kept for the next request that brings the same one."""


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        vocabulary: columns of the model's logits; there may be more of them than tokens.
    """

    def __init__(self, text: Text, vocabulary: int) -> None:
        self._text, self._vocabulary = text, vocabulary
        self._compiled = lru_cache(maxsize=KEPT)(self._compile)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Takes about a second for a large vocabulary, so only the first constrained request waits for it."""
        backend = self._text.backend
        ends = sorted(self._text.ends) or None
        return LLTokenizer(backend.to_str(), n_vocab=self._vocabulary, eos_token=ends)

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar that `matcher` will be asked for. Takes long for large ones, without holding the GIL.

        Raises:
            InvalidRequest: it cannot be compiled; says why.
        """
        self._compiled(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new text's matcher; raises as `compile`."""
        return Matcher(self._compiled(grammar).deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            if grammar.kind == "json_schema":
                rules = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON)
            else:
                rules = LLMatcher.grammar_from_lark(grammar.text)
        except ValueError as error:
            raise _unusable(grammar, str(error)) from error
        matcher = LLMatcher(self._tokenizer, rules, log_level=0)
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        return matcher


class Matcher:
    """Follows one text through its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        """The row of logits, shape (vocabulary,), with those of forbidden tokens at minus infinity."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary]).bool()
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, id: int) -> bool:
        """Go on by a token; true once nothing can follow.

        Raises:
            InvalidRequest: the grammar cannot be followed any further, because it is too complex.
        """
        self._matcher.consume_token(id)
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be followed: {self._matcher.get_error()}", "grammar")
        return bool(self._matcher.is_stopped())


def _unusable(grammar: Grammar, why: str) -> InvalidRequest:
    what = "JSON schema" if grammar.kind == "json_schema" else "grammar"
    return InvalidRequest(f"the {what} cannot be compiled: {why.strip()}", "grammar")
