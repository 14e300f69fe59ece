"""Grammars of clients: those that would take hours or all memory are refused, and what passes is followed in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from raymodels.serve import grammar_compiler
from raymodels.serve.confined import Busy
from raymodels.serve.engine import Grammar, InvalidRequest, QueueFull
from raymodels.serve.grammar import Grammars
from raymodels.serve.text import Text

MIB = 2**20
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
WORD = "qqxzzy"
"""A part of the schemas that no message may quote."""


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"{WORD}{at}": STRING for at in range(count)}}


def chained(depth: int) -> dict[str, Any]:
    steps = {f"{WORD}{at}": {"type": "array", "items": {"$ref": f"#/$defs/{WORD}{at + 1}"}} for at in range(depth)}
    return {"$ref": f"#/$defs/{WORD}0", "$defs": steps | {f"{WORD}{depth}": INTEGER}}


@pytest.fixture(scope="module")
def text(prepared: str) -> Text:
    return Text(AutoTokenizer.from_pretrained(Path(prepared) / "tokenizer"))


@pytest.fixture(scope="module")
def grammars(text: Text) -> Iterator[Grammars]:
    before = psutil.Process().children()
    with mock.patch.object(grammar_compiler, "SECONDS", 0.2):
        found = Grammars(text, text.size)
        yield found
        found.close()
    assert psutil.Process().children() == before


def schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


TOO_MUCH = {
    "minItems": {"type": "array", "items": INTEGER, "minItems": 10**7, "maxItems": 10**8},
    "maxItems": {"type": "array", "items": INTEGER, "maxItems": 10**6},
    "patterns": {"type": "string", "allOf": [{"pattern": f"({WORD}|b)*a(a|b){{{n}}}"} for n in range(1, 21)]},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": factor} for factor in (7, 11, 13, 17, 19, 23)]},
    "multiple": {"type": "integer", "multipleOf": 1000003},
    "optional properties": optional(600),
    "nested references": chained(3000),
    "large text": {"enum": [f"{WORD}{at:0100}" for at in range(12000)]},
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_takes_too_much_is_refused(grammars: Grammars, name: str) -> None:
    ours = psutil.Process()
    before = ours.memory_info().rss
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"cannot be compiled: it (is|takes)") as refused:
        grammars.compile_now(schema(TOO_MUCH[name]))
    assert time.monotonic() - began < 20
    assert ours.memory_info().rss - before < 64 * MIB
    assert refused.value.field == "grammar"
    assert WORD not in str(refused.value) and len(str(refused.value)) < 200


WITHOUT_TEXT, LEADS_NOWHERE = "no text can match it", "a $ref in it leads to no schema, or to itself"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"$ref": "#"}, LEADS_NOWHERE),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, LEADS_NOWHERE),
        (
            {"items": {"$ref": "#/x/0"}, "x": [{"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"$ref": "#/x/0"}}},
            LEADS_NOWHERE,
        ),
        ({"enum": []}, WITHOUT_TEXT),
        ({"type": "integer", "minimum": 5, "maximum": 3}, WITHOUT_TEXT),
        ({"$ref": f"#/{WORD}"}, LEADS_NOWHERE),
        ({"$ref": f"http://example.com/{WORD}"}, LEADS_NOWHERE),
        ({"allOf": [{"$ref": "#"}, {"type": "object"}]}, LEADS_NOWHERE),
        ({"type": "string", "pattern": f"(?={WORD})a"}, "a pattern in it cannot be enforced"),
        (
            {"patternProperties": {f"^{WORD}": STRING, "^q": INTEGER}},
            "patterns in its patternProperties match the same names",
        ),
        ({"type": "array", "uniqueItems": True}, "it uses uniqueItems, which cannot be enforced"),
        ({"if": STRING, "then": {}}, "it uses if, then, which cannot be enforced"),
        ({"type": "array", "maxItems": -1}, "maxItems has a value that it cannot have"),
        ({"type": WORD}, "type has a value that it cannot have"),
        ({"multipleOf": 0}, "it is not understood"),
        ([], "it is not a JSON object"),
    ],
)
def test_messages_say_why_and_quote_nothing(grammars: Grammars, given: Any, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars.compile_now(schema(given))
    assert str(refused.value) == f"the JSON schema cannot be compiled: {why}"


def test_references_that_lead_somewhere_are_followed(grammars: Grammars) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/$defs/tree"}}}
    unused = {
        "tree": {"$ref": "#"},
        "loop": {"$ref": "#/$defs/loop"},
        "or": {"anyOf": [{"$ref": "#/$defs/or"}, INTEGER]},
    }
    for given in (tree | {"$defs": unused}, {"items": {"$ref": "#/$defs/or"}, "$defs": unused}):
        grammars.compile_now(schema(given))


FORCED = {
    "an array": {"type": "array", "items": {"const": "x" * 1000}, "minItems": 30_000},
    "an object": {
        "type": "object",
        "properties": {f"p{at}": {"const": at} for at in range(2000)},
        "required": [f"p{at}" for at in range(2000)],
        "additionalProperties": False,
    },
    "a text": {"const": "x" * 200_000},
}


@pytest.mark.parametrize("name", FORCED)
def test_the_next_token_is_found_in_time_however_much_text_must_follow(grammars: Grammars, name: str) -> None:
    """Of these schemas' texts nearly all is certain from the start."""
    matcher = grammars.matcher(grammars.compile_now(schema(FORCED[name])))
    slowest = 0.0
    for _ in range(50):
        began = time.thread_time()
        allowed = matcher.forbid(torch.zeros(grammars._vocabulary))
        matcher.accept(int(allowed.argmax()))
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.05


def test_a_verdict_is_remembered(grammars: Grammars) -> None:
    probed = 0
    compiler = grammars._compiler
    assert compiler is not None
    probe = compiler._probed

    async def counted(data: bytes) -> bytes:
        nonlocal probed
        probed += 1
        return await probe(data)

    async def ask(given: Any, times: int) -> list[Any]:
        asked = [grammars.compile(schema(given)) for _ in range(times)]
        return await asyncio.gather(*asked, return_exceptions=True)

    with mock.patch.object(compiler, "_probed", counted):
        for _ in range(2):
            found = asyncio.run(ask({"type": "array", "items": INTEGER, "maxItems": 10**6 + 1}, 3))
            assert all("cannot be compiled: it takes more than" in str(each) for each in found)
        assert probed == 1
        first, second = asyncio.run(ask({"enum": ["once"]}, 2))
        assert first is second is asyncio.run(ask({"enum": ["once"]}, 1))[0]
        assert probed == 2


def test_what_takes_long_holds_nobody_up(grammars: Grammars) -> None:
    ended: list[str] = []

    async def compile(name: str, given: Any) -> None:
        with contextlib.suppress(InvalidRequest):
            await grammars.compile(schema(given))
        ended.append(name)

    async def main() -> None:
        slow = [{"type": "array", "items": INTEGER, "maxItems": 10**6 + at} for at in range(2, 5)]
        waiting = [asyncio.create_task(compile("slow", each)) for each in slow]
        await asyncio.sleep(0.2)
        await compile("quick", {"enum": ["quick"]})
        await asyncio.gather(*waiting)

    asyncio.run(main())
    assert ended.index("quick") <= 1


def test_a_caller_that_has_left_waits_for_nothing(grammars: Grammars) -> None:
    async def main() -> None:
        slow = schema({"type": "array", "items": INTEGER, "maxItems": 10**6 + 9})
        call = asyncio.create_task(grammars.compile(slow))
        await asyncio.sleep(0.05)
        call.cancel()
        assert (await grammars.compile(schema({"enum": ["left"]}))).kind == "json_schema"

    asyncio.run(main())


def test_on_a_machine_that_is_too_busy_a_grammar_may_be_tried_again(grammars: Grammars) -> None:
    compiler, given = grammars._compiler, schema({"enum": ["busy"]})
    assert compiler is not None
    busy = mock.patch.object(compiler._confined, "call", mock.AsyncMock(side_effect=Busy("busy")))
    with busy, pytest.raises(QueueFull, match="try again later"):
        grammars.compile_now(given)
    assert grammars.compile_now(given).text == given.text


def test_compiled_grammars_are_held_up_to_a_size(grammars: Grammars) -> None:
    one, two, three = (schema({"enum": [at, "held"]}) for at in range(3))
    first = grammars.compile_now(one)
    assert grammars.compile_now(one) is first
    with mock.patch.object(grammar_compiler, "HELD_BYTES", int(2.5 * first.bytes)):
        second = grammars.compile_now(two)
        with pytest.raises(QueueFull, match="take all memory"):
            grammars.compile_now(three)
        del second
        third = grammars.compile_now(three)
        assert grammars.compile_now(three) is third
        assert grammars.compile_now(one) is first  # still in use


DEAD_END = {
    "type": "object",
    "properties": {"a": {"const": "0123456789" * 6}, "b": {"$ref": "#/$defs/b"}},
    "required": ["a", "b"],
    "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/b"}]}},
}


def test_a_text_that_cannot_be_ended_is_an_honest_error(grammars: Grammars) -> None:
    matcher = grammars.matcher(grammars.compile_now(schema(DEAD_END)))
    with pytest.raises(InvalidRequest, match="cannot be followed any further: no text can match it"):
        for _ in range(1000):
            matcher.accept(int(matcher.forbid(torch.zeros(grammars._vocabulary)).argmax()))


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_columns(text: Text) -> None:
    columns = text.encode("a")[0] + 1
    grammars = Grammars(text, columns)
    matcher = grammars.matcher(grammars.compile_now(Grammar("lark", f'start: "a" | "{chr(0x10FFFF)}"')))
    assert matcher.forbid(torch.zeros(columns)).isfinite().nonzero().flatten().tolist() == [columns - 1]
    grammars.close()
