"""JSON schemas that are dear, cannot be met, or are none: each a function of a seeded generator of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = Any
INTEGERS = {"type": "array", "items": {"type": "integer"}}


def many_items(draw: Random) -> Schema:
    least = 10 ** draw.randint(4, 8)
    return INTEGERS | {"minItems": least, "maxItems": least * draw.choice([1, 10])}


def most_items(draw: Random) -> Schema:
    return INTEGERS | {"maxItems": 10 ** draw.randint(5, 9)}


def long_text(draw: Random) -> Schema:
    return {"type": "string", draw.choice(["minLength", "maxLength"]): 10 ** draw.randint(5, 9)}


def counted_pattern(draw: Random) -> Schema:
    most = 10 ** draw.randint(3, 6)
    unit = draw.choice(["a", "(a|b)", "[a-z]{1,50}", "(a|b)*a(a|b){20}", "(x+x+)+y", "\\p{L}"])
    return {"type": "string", "pattern": f"^({unit}){{{most // 2},{most}}}$"}


def exploding_pattern(draw: Random) -> Schema:
    return {"type": "string", "pattern": f"^(a|b)*a(a|b){{{draw.randint(12, 40)}}}$"}


def all_of_patterns(draw: Random) -> Schema:
    count = draw.randint(10, 40)
    return {"allOf": [{"type": "string", "pattern": f"^.*{chr(97 + at % 26)}.{{{at}}}x.*$"} for at in range(count)]}


def optional_properties(draw: Random) -> Schema:
    count = draw.randint(300, 3000)
    return {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(count)}}


def required_properties(draw: Random) -> Schema:
    names = [f"p{at}" for at in range(draw.randint(300, 2000))]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


def reference_loop(draw: Random) -> Schema:
    count = draw.randint(1, 5)
    loop = {f"d{at}": {"$ref": f"#/$defs/d{(at + 1) % count}"} for at in range(count)}
    return {"$defs": loop, "$ref": "#/$defs/d0"}


def references_that_multiply(draw: Random) -> Schema:
    depth = draw.randint(8, 30)
    each = {f"d{at}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{at + 1}"}] * 4} for at in range(depth)}
    return {"$defs": each | {f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def multiples(draw: Random) -> Schema:
    primes = [1000003, 999983, 99991, 7919, 104729, 0.0001, 1e-300, 1e300]
    return {"allOf": [{"type": "number", "multipleOf": each} for each in draw.sample(primes, draw.randint(1, 5))]}


def wide_range(draw: Random) -> Schema:
    return {"type": draw.choice(["integer", "number"]), "minimum": -(10 ** draw.randint(10, 400)), "maximum": 1.5e-300}


def long_enumeration(draw: Random) -> Schema:
    return {"enum": [f"{at} {draw.random()}" for at in range(draw.randint(2000, 8000))]}


def alternatives(draw: Random) -> Schema:
    kind = draw.choice(["anyOf", "oneOf", "allOf"])
    return {kind: [{"properties": {f"k{at}": {"const": at}}, "required": [f"k{at}"]} for at in range(200)]}


def nested(draw: Random) -> Schema:
    found: Schema = {"type": "null"}
    for _ in range(draw.choice([30, 60, 63, 64, 65, 300])):
        found = {"type": "array", "items": found}
    return found


def unsatisfiable(draw: Random) -> Schema:
    return draw.choice(
        [
            False,
            {"not": {}},
            {"enum": []},
            {"type": "integer", "minimum": 2, "maximum": 1},
            {"type": "string", "minLength": 5, "maxLength": 4},
            {"allOf": [{"const": 1}, {"const": 2}]},
            {"type": "object", "required": ["a"], "properties": {"a": False}},
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            {"type": "number", "multipleOf": 0},
            INTEGERS | {"minItems": 3, "maxItems": 2},
        ]
    )


def no_schema(draw: Random) -> Schema:
    return draw.choice(
        [
            None,
            [],
            "object",
            7,
            {"type": 7},
            {"type": "integers"},
            {"properties": [1]},
            {"$ref": "http://127.0.0.1:1/schema.json"},
            {"$ref": "#/nowhere"},
            {"pattern": "("},
            {"pattern": "(?=a)b\\1"},
            {"minItems": -1},
            {"minItems": "1"},
            {"enum": 5},
            {"unheard_of": 1},
            {"format": "no-format"},
            {"type": "string", "pattern": "\x00\ud800"},
        ]
    )


def together(draw: Random) -> Schema:
    """Several of the above as the properties of one object."""
    return {"type": "object", "properties": {f"p{at}": draw.choice(KINDS)(draw) for at in range(draw.randint(2, 5))}}


KINDS: list[Callable[[Random], Schema]] = [
    many_items,
    most_items,
    long_text,
    counted_pattern,
    exploding_pattern,
    all_of_patterns,
    optional_properties,
    required_properties,
    reference_loop,
    references_that_multiply,
    multiples,
    wide_range,
    long_enumeration,
    alternatives,
    nested,
    unsatisfiable,
    no_schema,
]
