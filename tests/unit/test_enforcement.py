"""Schemas that cannot be enforced, over HTTP: what an answer must match is refused by name, what it may call is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from raymodels.config import EngineConfig
from tests.random_models import random_model
from tests.unit.endpoint import endpoint
from tests.unit.test_grammar import DEAD_END, TOO_MUCH, WORD, optional

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} <tool_call>\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
IGNORED = "X-Raymodels-Ignored"


@pytest.fixture(scope="module")
def client(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder, models = tmp_path_factory.mktemp("endpoint"), {}
    for name, template in {"tagged": TEMPLATE, "plain": TEMPLATE.replace("<tool_call>", "")}.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = template
        models[name] = random_model(folder / name, tokenizer, max_position_embeddings=2048)
    with endpoint(folder, models, EngineConfig(max_batch=4)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "tagged", "messages": messages, "max_tokens": 300, "temperature": 0} | fields
    return client.post("/v1/chat/completions", json=body)


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def refused(response: httpx.Response) -> Any:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert WORD not in error["message"]
    return error


@pytest.mark.slow
@pytest.mark.parametrize("given", [TOO_MUCH["minItems"], optional(600), LOOP, TOO_MUCH["multiples"], {"type": "fish"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_format_that_cannot_be_enforced_is_refused(client: httpx.Client, given: Any, stream: bool) -> None:
    error = refused(ask(client, response_format=form(given), stream=stream))
    assert error["param"] == "response_format"
    assert error["message"].startswith("the JSON schema cannot be compiled: ")
    good = form({"enum": ["fine"]})
    assert ask(client, response_format=good).json()["choices"][0]["message"]["content"] == '"fine"'


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tagged", "plain"])
@pytest.mark.parametrize("choice", ["required", named("bad")])
def test_a_tool_that_must_be_called_is_refused_by_its_name(client: httpx.Client, model: str, choice: Any) -> None:
    parameters = {"type": "object", "properties": {"fine": {"type": "string"}, "loop": LOOP["$defs"]["a"]}, **LOOP}
    del parameters["$ref"]
    error = refused(ask(client, model=model, tools=[tool("good", POINT), tool("bad", parameters)], tool_choice=choice))
    assert error["param"] == "tools.bad.parameters.properties.loop"
    assert error["message"].startswith("tool 'bad', property 'loop': the JSON schema cannot be compiled: ")


@pytest.mark.slow
def test_a_tool_that_is_too_large_as_a_whole_is_refused_by_its_name(client: httpx.Client) -> None:
    error = refused(ask(client, tools=[tool("good", POINT), tool("large", optional(600))], tool_choice="required"))
    assert error["param"] == "tools.large.parameters"


@pytest.mark.slow
def test_tools_that_are_too_large_together_are_refused(client: httpx.Client) -> None:
    tools = [tool(f"t{at}", {"properties": {"a": {"const": f"{WORD}{at}" * 40_000}}}) for at in range(4)]
    error = refused(ask(client, tools=tools, tool_choice="required"))
    assert error["param"] == "tools"
    response = ask(client, tools=tools, max_tokens=1)
    assert (response.status_code, response.headers[IGNORED]) == (
        200,
        ", ".join(f"tools.t{at}.parameters" for at in range(4)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_may_be_called_is_offered_all_the_same(client: httpx.Client, stream: bool) -> None:
    tools = [tool("good", POINT), tool("bad", LOOP), tool("large", optional(600))]
    response = ask(client, tools=tools, stream=stream, max_tokens=5)
    assert response.status_code == 200
    assert response.headers[IGNORED] == "tools.bad.parameters, tools.large.parameters"
    response = ask(client, tools=tools[:1], stream=stream, max_tokens=5)
    assert IGNORED not in response.headers


@pytest.mark.slow
def test_beside_tools_a_response_format_is_still_refused(client: httpx.Client) -> None:
    error = refused(ask(client, tools=[tool("good", POINT)], response_format=form(LOOP)))
    assert error["param"] == "response_format"


@pytest.mark.slow
def test_what_only_fails_later_ends_one_answer_with_an_honest_error(client: httpx.Client) -> None:
    error = refused(ask(client, response_format=form(DEAD_END)))
    assert error["param"] == "response_format"
    assert error["message"] == "the grammar cannot be followed any further: no text can match it"
    lines = ask(client, response_format=form(DEAD_END), stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1]).startswith('{"a": "01')
    assert events[-1] == {"error": error}
    assert ask(client, max_tokens=3).status_code == 200
