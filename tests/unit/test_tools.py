"""Tool calls: what their grammars let through, and how the calls are read out of a text in any pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from raymodels.serve.schema import ChatRequest, read_chat
from raymodels.serve.tools import ToolReader, grammar_of, without_tool_roles

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '{"name": "weather", "arguments": {"city": "Köln {\\"}", "days": 2}}'
NOW = '{"name": "now", "arguments": {}}'


def request(**fields: Any) -> ChatRequest:
    return read_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS} | fields)


def tags(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.fixture(scope="module")
def tokenizer(prepared: str) -> LLTokenizer:
    return LLTokenizer(str(Path(prepared) / "tokenizer" / "tokenizer.json"))


def matches(tokenizer: LLTokenizer, text: str, tagged: bool, **fields: Any) -> bool:
    """Whether a text may be written, and end where it does."""
    grammar = grammar_of(request(**fields), tagged)
    assert grammar is not None and grammar.kind == "lark"
    compiled = LLMatcher.grammar_from_lark(grammar.text)
    assert not LLMatcher.validate_grammar(compiled, tokenizer)
    matcher, tokens = LLMatcher(tokenizer, compiled), tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


NAMED = {"type": "function", "function": {"name": "now"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("text", "tagged", "fields", "allowed"),
    [
        ("any text <tool", True, {}, True),
        (tags(CALL), True, {}, True),
        ("first some text\n" + tags(CALL, NOW), True, {}, True),
        (tags(CALL, NOW), True, {"parallel_tool_calls": False}, False),
        (tags('{"name": "weather", "arguments": {"days": 2}}'), True, {}, False),
        (tags('{"name": "unknown", "arguments": {}}'), True, {}, False),
        ("<tool_call>\nsome text", True, {}, False),
        ("text", True, {"tool_choice": "required"}, False),
        (tags(CALL, NOW), True, {"tool_choice": "required"}, True),
        (tags(CALL), True, {"tool_choice": NAMED}, False),
        (tags(NOW), True, {"tool_choice": NAMED}, True),
        (CALL, False, {"tool_choice": "required"}, True),
        ("text", False, {"tool_choice": "required"}, False),
        ("17", True, {"response_format": FORMAT}, True),
        (tags(NOW), True, {"response_format": FORMAT}, True),
        ("text", True, {"response_format": FORMAT}, False),
    ],
)
def test_a_grammar_lets_through_what_the_request_allows(
    tokenizer: LLTokenizer, text: str, tagged: bool, fields: dict[str, Any], allowed: bool
) -> None:
    assert matches(tokenizer, text, tagged, **fields) == allowed


def test_where_nothing_constrains_there_is_no_grammar() -> None:
    assert grammar_of(request(), tagged=False) is None
    assert grammar_of(request(tool_choice="none"), tagged=True) is None
    form = grammar_of(request(tool_choice="none", response_format={"type": "json_object"}), tagged=True)
    assert form is not None and (form.kind, json.loads(form.text)) == ("json_schema", {"type": "object"})


def read(text: str, seed: int | None) -> tuple[str, list[dict[str, Any]]]:
    """Content and calls of a text that comes in random pieces, put together as a client does."""
    draw, reader, content, calls = random.Random(seed), ToolReader(request().tools), "", list[dict[str, Any]]()
    while text or seed is None:
        size = len(text) if seed is None else draw.randint(1, 9)
        piece, text = text[:size], text[size:]
        more, parts = reader.read(piece, last=not text)
        content += more
        assert len({part["index"] for part in parts}) == len(parts)
        for part in parts:
            if part["index"] == len(calls):
                assert part["id"].startswith("call_") and part["type"] == "function"
                calls.append({"name": part["function"]["name"], "arguments": ""})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
        if seed is None:
            break
    return content, calls


WEATHER_CALL = {"name": "weather", "arguments": '{"city": "Köln {\\"}", "days": 2}'}
NOW_CALL = {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text, 1 < 2 <tool", "plain text, 1 < 2 <tool", []),
        (CALL, "", [WEATHER_CALL]),
        (" \n" + NOW, "", [NOW_CALL]),
        (tags(CALL, NOW), "", [WEATHER_CALL, NOW_CALL]),
        ("Let me see.\n" + tags(NOW) + "\n", "Let me see.\n", [NOW_CALL]),
        (tags(NOW) + "\nand on", "and on", [NOW_CALL]),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ('{"name": "now"}', '{"name": "now"}', []),
        ('{"name": "no', '{"name": "no', []),
        ("<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ('<tool_call>{"name": "now", "arguments": {"a": [1, ', "", [{"name": "now", "arguments": '{"a": [1, '}]),
        ("  ", "  ", []),
        ("", "", []),
    ],
)
def test_calls_are_read_out_of_any_pieces(text: str, content: str, calls: list[Any]) -> None:
    assert read(text, None) == (content, calls)
    for seed in range(50):
        assert read(text, seed) == (content, calls), seed


def test_arguments_are_sent_as_they_come() -> None:
    reader = ToolReader(request().tools)
    assert reader.read('{"name": "weather", ', last=False) == ("", [])
    (head,) = reader.read('"arguments": {"ci', last=False)[1]
    assert head["function"] == {"name": "weather", "arguments": '{"ci'}
    assert reader.read('ty": "', last=False) == ("", [{"index": 0, "function": {"arguments": 'ty": "'}}])


def test_a_template_without_tools_gets_them_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]
    system, user, assistant, tool = without_tool_roles(messages, request().tools)
    assert system["role"] == "system" and '"name": "weather"' in system["content"]
    assert (user, tool) == (messages[0], messages[2])
    assert assistant == {"role": "assistant", "content": NOW}
