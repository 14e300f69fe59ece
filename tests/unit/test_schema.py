"""Bodies of requests: what is read, what is ignored and what is refused, with the field's name."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from raymodels.serve.schema import (
    Refused,
    read_chat,
    read_completion,
    read_detokenize,
    read_embedding,
    read_tokenize,
)

COMPLETION = {"model": "m", "prompt": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
DEEP: dict[str, Any] = functools.reduce(lambda inner, _: {"items": inner}, range(70), {})
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert read_completion({"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [-1]),
        ("prompt", None),
        ("model", 3),
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("n", 0),
        ("n", 129),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", 1]),
        ("stop", ["x"] * 17),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("stream", 1),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"unknown": True}),
        ("best_of", 3),
        ("best_of", True),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"the": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", [1]),
        ("top_k", 2**40),
        ("suffix", "end"),
        ("unknown_field", 1),
        ("unknown_field", None),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(field: str, value: Any) -> None:
    with pytest.raises(Refused) as refused:
        read_completion({**COMPLETION, field: value})
    problem = refused.value.problem
    assert (problem.status, problem.param, problem.type) == (400, field, "invalid_request_error")
    assert field in problem.message or field == "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("max_tokens", 0),
        ("top_logprobs", 5),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "assistant", "tool_calls": []}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [CALL]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": [1]}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP}}),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": 5}}]),
        ("tools", [TOOL] * 129),
        ("tool_choice", "required"),
        ("tool_choice", "some"),
        ("tool_choice", {"type": "function", "function": {"name": "g"}}),
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("prompt", "x"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(field: str, value: Any) -> None:
    with pytest.raises(Refused) as refused:
        read_chat({**CHAT, field: value})
    assert (refused.value.problem.status, refused.value.problem.param) == (400, field)


@pytest.mark.parametrize("body", [None, 5, "text", [COMPLETION]])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(Refused, match="must be a JSON object"):
        read_completion(body)


def test_what_does_not_change_the_answer_is_ignored() -> None:
    harmless = {"user": {"any": 1}, "best_of": 1, "presence_penalty": 0, "logit_bias": {}, "suffix": "", "stop": None}
    assert read_completion({**COMPLETION, **harmless}) == read_completion(COMPLETION)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    chat = read_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert chat.messages[0].plain() == {"role": "user", "content": "one two"}


def test_numbers_without_a_fraction_are_integers() -> None:
    request = read_completion({"model": "m", "prompt": [[1.0, 2]], "n": 2.0, "seed": -1e3, "temperature": 1})
    assert (request.prompts, request.n, request.seed, request.temperature) == ([[1, 2]], 2, -1000, 1.0)
    assert type(request.n) is int


def test_a_conversation_with_calls() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]}
    broken = {**CALL, "function": {"name": "f", "arguments": '{"a": '}}
    returned = {"role": "tool", "tool_call_id": "1", "content": "9"}
    messages = [{"role": "user", "content": "x"}, answer, returned, {"role": "assistant", "tool_calls": [broken]}]
    user, called, result, cut = (message.plain() for message in read_chat({**CHAT, "messages": messages}).messages)
    assert user == {"role": "user", "content": "x"}
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}} and called["content"] == ""
    assert result == returned
    assert cut["tool_calls"][0]["function"]["arguments"] == '{"a": '


def test_a_forced_tool_is_the_only_one_callable() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    named = {"type": "function", "function": {"name": "g"}}
    request = read_chat({**CHAT, "tools": [TOOL, other], "tool_choice": named})
    assert [tool.function.name for tool in request.callable_tools] == ["g"] and request.must_call
    free = read_chat({**CHAT, "tools": [TOOL, other], "tool_choice": "none"})
    assert not free.callable_tools and not free.must_call


def test_a_schema_is_kept_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1.0, None]}}, "default": None}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    request = read_chat({**CHAT, "response_format": form})
    assert request.json_schema == schema
    assert pickle.loads(pickle.dumps(request)) == request
    assert read_chat({**CHAT, "response_format": {"type": "json_object"}}).json_schema == {"type": "object"}
    assert read_chat({**CHAT, "response_format": {"type": "text"}}).json_schema is None


def test_only_one_limit_of_a_chat_is_given() -> None:
    with pytest.raises(Refused, match="give one of them"):
        read_chat({**CHAT, "max_tokens": 5, "max_completion_tokens": 5})


@pytest.mark.parametrize(
    ("read", "body", "field"),
    [
        (read_embedding, {"input": "x"}, "model"),
        (read_embedding, {"model": "m", "input": ""}, "input"),
        (read_embedding, {"model": "m", "input": []}, "input"),
        (read_embedding, {"model": "m", "input": ["a", 1]}, "input"),
        (read_embedding, {"model": "m", "input": "x", "encoding_format": "int8"}, "encoding_format"),
        (read_embedding, {"model": "m", "input": "x", "dimensions": 0}, "dimensions"),
        (read_tokenize, {"model": "m"}, "prompt"),
        (read_tokenize, {"prompt": ["a"]}, "prompt"),
        (read_tokenize, {"messages": []}, "messages"),
        (read_tokenize, {"messages": CHAT["messages"], "prompt": "x"}, "prompt"),
        (read_detokenize, {"tokens": [-1]}, "tokens"),
        (read_detokenize, {"tokens": "x"}, "tokens"),
    ],
)
def test_a_wrong_field_of_another_route_is_named(read: Callable[[Any], Any], body: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as refused:
        read(body)
    assert (refused.value.problem.status, refused.value.problem.param) == (400, field)


def test_inputs_of_embeddings() -> None:
    for given, inputs in [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]:
        assert read_embedding({"model": "m", "input": given}).inputs == inputs
