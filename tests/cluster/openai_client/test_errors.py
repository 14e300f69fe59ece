"""What is refused, and the exception of the client that it becomes."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.cluster.openai_client.asking import (
    FORMAT,
    MAX_BODY,
    SURROGATE,
    TOOLS,
    ask,
    send,
)

REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": -1}, "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": 2000}, "max_tokens"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [10**6]}, "prompt"),
    ("completions", {"prompt": [1] * 1025}, "prompt"),
    ("completions", {"n": 0}, "n"),
    ("completions", {"n": 129}, "n"),
    ("completions", {"temperature": 2.1}, "temperature"),
    ("completions", {"top_p": -0.1}, "top_p"),
    ("completions", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"1000000": 1}}, "logit_bias"),
    ("completions", {"stop": ""}, "stop"),
    ("completions", {"best_of": 2}, "best_of"),
    ("completions", {"suffix": "end"}, "suffix"),
    ("chat", {"presence_penalty": 2.1}, "presence_penalty"),
    ("chat", {"frequency_penalty": -2.1}, "frequency_penalty"),
    ("chat", {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat", {"stream_options": {"nonsense": True}, "stream": True}, "stream_options"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ("chat", {"response_format": {"type": "yaml"}}, "response_format"),
    ("chat", {"response_format": FORMAT | {"json_schema": {"name": "x", "schema": {"type": 5}}}}, "response_format"),
    ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"extra_body": {"nonsense": 1}}, "nonsense"),
    ("completions", {"extra_body": {"nonsense": None, "other": 1}}, "nonsense"),
]


@pytest.mark.parametrize(("route", "fields", "param"), REFUSED, ids=[f"{r}-{str(f)[:40]}" for r, f, _ in REFUSED])
def test_what_is_refused_is_named(ai: openai.OpenAI, route: str, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(ai, route, **fields)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert refused.value.request_id


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"prompt": SURROGATE}, "prompt"),
        ("completions", {"prompt": ["x", SURROGATE]}, "prompt"),
        ("completions", {"stop": SURROGATE}, "stop"),
        ("chat", {"messages": [{"role": "user", "content": SURROGATE}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "x"}], SURROGATE: 1}, None),
    ],
)
def test_a_lone_surrogate_is_no_character(
    ai: openai.OpenAI, route: str, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        send(ai, route, **fields)
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["nobody", "tiny/x", SURROGATE])
def test_a_model_that_is_not_there(ai: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        send(ai, "completions", model=name)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    if name != SURROGATE:
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve(name)


def test_a_path_that_is_not_there(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ai.fine_tuning.jobs.list()


def test_a_body_that_is_too_large(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(ai, "completions", prompt="x" * MAX_BODY)
    assert refused.value.status_code == 413


def test_a_wrong_key(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(ai.with_options(api_key="rm-wrong"), "chat")


def test_over_a_quota(ai: openai.OpenAI, keys: dict[str, str]) -> None:
    slow = ai.with_options(api_key=keys["slow"])
    ask(slow, "completions", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(slow, "completions", max_tokens=1)
    assert int(limited.value.response.headers["Retry-After"]) >= 1


def test_a_client_that_does_not_wait(ai: openai.OpenAI, endless: dict[str, Any]) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(ai, "completions", **endless, timeout=0.05)


def test_a_server_that_is_told_not_to_take_longer(ai: openai.OpenAI, endless: dict[str, Any]) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        ask(ai, "completions", **endless, extra_headers={"X-Request-Timeout": "0.5"})
    assert (late.value.status_code, late.value.code) == (504, "timeout")
