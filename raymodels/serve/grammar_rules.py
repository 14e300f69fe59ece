"""Grammars as llguidance compiles them: by which rules, within which limits, and why one is refused.

Loads no torch: `Probe` is what processes run in which a grammar is tried before it is compiled where tokens are made.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from raymodels.serve.confined_worker import allocated

# JSON allows white space without end, and some models would write nothing else. So it is written as most write it.
JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
HEAD = '%llguidance {"no_forcing": true}\n'
"""Or llguidance looks, at every token, for all text that must follow: of an array with minItems, for seconds."""
LIMITS = LLParserLimits(
    max_lexer_states=30_000,  # of 1 to 2 KiB each, in every text that is generated
    verbose_errors=False,  # or messages hold the grammar and the state of the parser
)
"""Others are llguidance's own: a step of the lexer takes 15 ms at most, one of the parser 3 ms."""
TEXTS, STEPS = 4, 32
"""How many texts a grammar is tried on, and tokens of each."""
NO_TEXT = "no text can match it"
COMPLEX = "it is too complex"
REFERENCE = "a $ref in it leads to no schema, or to itself"
DEFINITIONS = ("$defs", "definitions")
LATE = "the server had no time to judge it"
"""Of a grammar of which nothing is known yet."""
REASONS = {
    r"Unimplemented keys: \[([^\]]*)\]": "it uses {}, which cannot be enforced",
    r"Unknown format": "it uses a format that cannot be enforced",
    r"regex parse error|lookaround": "a pattern in it cannot be enforced",
    r"^Failed to generate regex": "a range in it cannot be enforced",
    r"not disjoint": "patterns in its patternProperties match the same names",
    r"^Unsatisfiable|^NoExtension": NO_TEXT,
    r"^(?:Resource|Pointer|\$ref|circular)": REFERENCE,
    r"^Invalid (type)|^Expected .* for '(\w{1,32})'|^([$\w]{1,32}) must be": "{} has a value that it cannot have",
    r"^panic|[Tt]oo (?:many|large|big)|Unable to determine|Current row has|fuel": COMPLEX,
}
"""What llguidance says, and what is told: its own messages quote the grammar."""


class Unusable(ValueError):
    """A grammar cannot be followed; says why, without quoting it."""


def tokenizer(definition: str, vocabulary: int, ends: Sequence[int]) -> LLTokenizer:
    """A tokenizer of `tokenizers`, given as JSON, for llguidance. For a large vocabulary it takes about a second."""
    return LLTokenizer(definition, n_vocab=vocabulary, eos_token=list(ends) or None)


def lark(kind: str, text: str) -> str:
    """A grammar in llguidance's Lark dialect.

    Raises:
        Unusable: the text of a JSON schema is none.
    """
    if kind == "lark":
        return HEAD + text
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable("it is not JSON") from None
    if not isinstance(schema, dict):
        raise Unusable("it is not a JSON object")
    _check_references(schema)
    return f"{HEAD}start: {json_rule(schema)}"


def _check_references(schema: dict[str, Any]) -> None:
    """Raises `Unusable` for references that only lead to each other: a text could reach them, and never go on."""
    followed, nodes = set[str](), list[Any]([schema])
    while nodes:
        node, path = nodes.pop(), set[str]()
        while isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
            if reference in path:
                raise Unusable(REFERENCE)
            if reference in followed:
                break
            path.add(reference)
            node = _at(schema, reference)
        followed |= path
        if isinstance(node, dict):
            nodes += [each for key, each in node.items() if key not in DEFINITIONS]
        elif isinstance(node, list):
            nodes += node


def _at(schema: Any, reference: str) -> Any:
    """What a reference within a schema leads to; none if that is nothing, or elsewhere."""
    if not reference.startswith("#"):
        return None
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdecimal() and int(key) < len(schema):
            schema = schema[int(key)]
        else:
            schema = schema.get(key) if isinstance(schema, dict) else None
    return schema


def json_rule(schema: dict[str, Any]) -> str:
    """What stands for a JSON schema in a Lark grammar."""
    return "%json " + json.dumps(schema | {"x-guidance": JSON})


def compiled(rules: str, tokens: LLTokenizer) -> LLMatcher:
    """A grammar from `lark`, compiled. Holds no lock of the interpreter meanwhile.

    Raises:
        Unusable: it cannot be compiled.
    """
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(rules), log_level=0, limits=LIMITS)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """
    Raises:
        Unusable: the matcher has failed.
    """
    if matcher.is_error():
        raise Unusable(_reason(matcher.get_error()))


def _reason(error: str) -> str:
    said = re.sub(r"^at [\d()]+: (failed to compile JSON schema: )?", "", error.partition("\n   1 | ")[0])
    for pattern, reason in REASONS.items():
        if found := re.search(pattern, said):
            words = re.findall(r"[$\w]{1,32}", " ".join(group for group in found.groups() if group))
            return reason.format(", ".join(words[:8]))
    return "it is not understood"


class Probe:
    """Compiles grammars and generates some tokens by each, to see what it costs and whether it fails.

    Args:
        definition: a file with a tokenizer, as `tokenizer` takes it.
        vocabulary, ends: numbers, the latter as a JSON list.
    """

    def __init__(self, definition: str, vocabulary: str, ends: str) -> None:
        self._tokenizer = tokenizer(Path(definition).read_text(), int(vocabulary), json.loads(ends))

    def __call__(self, data: bytes) -> bytes:
        """Of a grammar's kind and text: why it is refused, or none, and the bytes that it takes, compiled."""
        before = allocated()
        kind, text = json.loads(data)
        try:
            matcher = compiled(lark(kind, text), self._tokenizer)
            taken = allocated() - before
            _generate(matcher)
        except Unusable as error:
            return json.dumps([str(error), 0]).encode()
        return json.dumps([None, taken]).encode()


def _generate(matcher: LLMatcher) -> None:
    """Begin some texts with tokens that a grammar allows, the same ones each time."""
    choose = random.Random(0)
    for copy in (matcher.deep_copy() for _ in range(TEXTS)):
        for _ in range(STEPS):
            allowed = copy.compute_bitmask()
            check(copy)
            copy.consume_token(_any(allowed, choose))
            check(copy)
            if copy.is_stopped():
                break


def _any(bits: bytes, choose: random.Random) -> int:
    """One of the bits that are set."""
    start = choose.randrange(len(bits))
    found = (at % len(bits) for at in range(start, start + len(bits)) if bits[at % len(bits)])
    at = next(found, None)
    if at is None:
        raise Unusable(NO_TEXT)
    return at * 8 + choose.choice([bit for bit in range(8) if bits[at] >> bit & 1])
