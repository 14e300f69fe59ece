"""Answers that follow a JSON schema, and tool calls."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChunkEvent
from pydantic import BaseModel

from tests.cluster.openai_client.asking import (
    FORMAT,
    GREEDY,
    PLACE,
    PROMPT,
    TOOLS,
    ask,
    said,
    text_of,
)


class Place(BaseModel):
    city: Literal["Paris", "Rome"]
    exact: bool


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", [{"type": "json_object"}, FORMAT])
def test_json(ai: openai.OpenAI, tokenizer: Any, form: Any, stream: bool) -> None:
    # The random model would fill an object without end: what closes it is made likelier.
    bias = {str(tokenizer.convert_tokens_to_ids(token)): 30 for token in ("}", '"')}
    fields = {"response_format": form, "seed": 4, "max_completion_tokens": 400, "logit_bias": bias}
    if stream:
        content = "".join(text_of(chunk.choices[0]) for chunk in ask(ai, "chat", **fields, stream=True))
    else:
        content = said(ai, "chat", **fields)
    jsonschema.validate(json.loads(content), PLACE if form is FORMAT else {"type": "object"})


def test_text_is_a_format_too(ai: openai.OpenAI) -> None:
    assert said(ai, "chat", **GREEDY, response_format={"type": "text"}) == said(ai, "chat", **GREEDY)


def test_the_client_parses_what_it_asked_for(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = ai.chat.completions.parse(model="tiny", messages=messages, response_format=Place, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, Place)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "local_time"}}])
def test_a_tool_is_called(ai: openai.OpenAI, choice: Any) -> None:
    answer = ask(ai, "chat", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=1).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name in (["weather", "local_time"] if choice == "required" else ["local_time"])
    jsonschema.validate(json.loads(call.function.arguments), PLACE)


def test_no_tool_is_called_where_none_may_be(ai: openai.OpenAI) -> None:
    answer = ask(ai, "chat", **GREEDY, tools=TOOLS, tool_choice="none").choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content == said(ai, "chat", **GREEDY)


@pytest.mark.parametrize("seed", range(3))
def test_auto_leaves_the_choice_to_the_model(ai: openai.OpenAI, seed: int) -> None:
    answer = ask(ai, "chat", tools=TOOLS, tool_choice="auto", seed=seed, max_tokens=40).choices[0]
    assert (answer.finish_reason == "tool_calls") == bool(answer.message.tool_calls)
    assert answer.message.content or answer.message.tool_calls


def test_streamed_tool_calls_add_up(ai: openai.OpenAI) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    (expected,) = ask(ai, "chat", **fields).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in ask(ai, "chat", **fields, stream=True)]
    parts = [part for choice in chunks for part in choice.delta.tool_calls or []]
    assert (parts[0].id is not None, parts[0].type, parts[0].function.name) == (
        True,
        "function",
        expected.function.name,
    )
    assert {(part.index, part.id, part.function.name) for part in parts[1:]} == {(0, None, None)}
    assert "".join(part.function.arguments for part in parts) == expected.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_clients_own_reader_of_streams(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    fields: Any = {"messages": messages, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    with ai.chat.completions.stream(model="tiny", **fields, seed=1) as stream:
        assert any(isinstance(event, ChunkEvent) for event in stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    jsonschema.validate(json.loads(final.message.tool_calls[0].function.arguments), PLACE)


def test_a_conversation_goes_on_after_a_call(ai: openai.OpenAI) -> None:
    message = ask(ai, "chat", tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees"}
    messages = [{"role": "user", "content": PROMPT}, message, result]
    assert ask(ai, "chat", **GREEDY, messages=messages, tools=TOOLS).choices[0].finish_reason
