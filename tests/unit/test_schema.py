"""Bodies of requests: what is read, what is ignored and what is refused, with the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from raymodels.serve.schema import Refused, read_chat, read_completion

COMPLETION = {"model": "m", "prompt": "x"}
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
        ("presence_penalty", 0.5),
        ("logit_bias", {"1": 5}),
        ("suffix", "end"),
        ("unknown_field", 1),
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
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
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
    harmless = {"user": "u", "best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "stop": None}
    assert read_completion({**COMPLETION, **harmless}) == read_completion(COMPLETION)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    chat = read_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert chat.messages[0].plain() == {"role": "user", "content": "one two"}
