"""The OpenAPI page against the endpoint itself: what it says is what comes, whatever is sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openapi_spec_validator
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis.core.failures import FailureGroup
from schemathesis.openapi.checks import RejectedPositiveData
from transformers import AutoTokenizer

from raymodels.client import AsyncClient, Client
from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.openapi import _up_to, page
from raymodels.serve.replica import Description
from tests.unit import schemathesis_hooks
from tests.unit.endpoint import endpoint

MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MODEL = Description("m@1", 256, True, 0, 300, 8, 64)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def test_the_page_is_valid_and_bounded_by_its_models() -> None:
    other = Description("p@1", 512, False, 0, 400, 4, 32)
    document = page({"m": MODEL, "plain": other}, HttpConfig(keys_file="keys.yaml"))
    openapi_spec_validator.validate(document)
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["m"]
    assert schemas["CompletionRequest"]["properties"]["model"]["enum"] == ["m", "plain"]
    assert schemas["CompletionRequest"]["properties"]["max_tokens"]["maximum"] == 511
    assert "x-limit" not in json.dumps(document)
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"bearer": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]


@pytest.mark.parametrize("models", [{}, {"m": None}])
def test_the_page_needs_no_running_model(models: dict[str, None]) -> None:
    document = page(models, HttpConfig(keys_file=None))
    openapi_spec_validator.validate(document)
    assert "securitySchemes" not in document["components"]


@pytest.mark.parametrize("most", [0, 1, 9, 10, 99, 100, 299, 300, 49151])
def test_a_pattern_of_numbers_holds_all_of_them_and_no_other(most: int) -> None:
    pattern = re.compile(_up_to(most))
    for number in [*range(2000), most - 1, most, most + 1, 10 * most + 10]:
        assert bool(pattern.fullmatch(str(number))) == (0 <= number <= most)
    assert not pattern.fullmatch("00") and not pattern.fullmatch("")


def test_every_route_is_on_the_page() -> None:
    from raymodels.serve.gateway import Gateway, app

    assert Gateway.func_or_class
    routes = {(method.lower(), route.path.replace(":path", "")) for route in _routes(app) for method in route.methods}
    paths = page({"m": MODEL}, HttpConfig())["paths"]
    assert routes == {(method, path) for path, methods in paths.items() for method in methods}


def _routes(router: Any) -> Iterator[APIRoute]:
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from _routes(route.original_router)


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("endpoint")
    model_dir = folder / "model"
    model_dir.mkdir()
    for file in tiny_model_dir.iterdir():
        (model_dir / file.name).write_bytes(file.read_bytes())
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_dir)
    engine = EngineConfig(max_batch=8, max_queue=64)
    with endpoint(folder, {"m": model_dir}, engine, max_body_bytes=200_000, max_output_tokens=40) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return httpx.get(f"{url}/openapi.json").json()


CALLS: list[tuple[str, dict[str, Any] | None]] = [
    ("/v1/completions", {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "n": 2}),
    ("/v1/completions", {"model": "m", "prompt": [[5, 6]], "max_tokens": 0, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 3, "echo": True, "logprobs": 0}),
    ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 3, "logit_bias": {"5": 100}, "temperature": 0}),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "max_tokens": 5, "logprobs": True}),
    (
        "/v1/chat/completions",
        {"model": "m", "messages": MESSAGES, "max_tokens": 5, "top_logprobs": 3, "logprobs": True},
    ),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 5}),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/embeddings", {"model": "m", "input": ["a", "b"], "dimensions": 64}),
    ("/v1/embeddings", {"model": "m", "input": [5, 6], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "the model", "return_token_strs": True}),
    ("/tokenize", {"model": "m", "messages": MESSAGES}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/tokenizer_info", None),
    ("/v1/models", None),
    ("/v1/models/m", None),
    ("/v1/models/other", None),
    ("/v1/completions", {"model": "other", "prompt": ""}),
    ("/v1/completions", {"model": "m", "prompt": [999]}),
    ("/readyz", None),
]


WRONG = {
    json.dumps({"model": "other", "prompt": ""}): 404,
    json.dumps({"model": "m", "prompt": [999]}): 400,
}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), CALLS)
def test_answers_are_as_the_page_says(url: str, document: Any, path: str, body: dict[str, Any] | None) -> None:
    answer = httpx.get(url + path) if body is None else httpx.post(url + path, json=body)
    described = document["paths"].get(path) or document["paths"]["/v1/models/{model}"]
    assert answer.status_code == {"/v1/models/other": 404}.get(path, WRONG.get(json.dumps(body), 200))
    responses = described["get" if body is None else "post"]["responses"]
    schema = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
    _valid(document, schema, answer.json())


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), [(path, body) for path, body in CALLS[:8] if body])
def test_streams_are_as_the_page_says(url: str, document: Any, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(url + path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    name = "CompletionChunk" if path == "/v1/completions" else "ChatCompletionChunk"
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]" and json.loads(events[-1])["usage"]["total_tokens"] > 0
    for event in events:
        _valid(document, {"$ref": f"#/components/schemas/{name}"}, json.loads(event))


def _valid(document: Any, schema: Any, value: Any) -> None:
    Draft202012Validator(schema | {"components": document["components"]}).validate(value)


@pytest.mark.slow
def test_a_forced_call_is_one(url: str) -> None:
    body = {"model": "m", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "seed": 5}
    choice = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("f", "tool_calls")
    assert Draft202012Validator(SCHEMA).is_valid(json.loads(call["function"]["arguments"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/completions"), ("DELETE", "/v1/models"), ("GET", "/tokenize")]
)
def test_another_method_is_405(url: str, method: str, path: str) -> None:
    answer = httpx.request(method, url + path)
    assert answer.status_code == 405 and answer.headers["allow"] and answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["response_format", "tools.f.parameters.properties.a"])
def test_a_schema_that_cannot_be_compiled_is_400(url: str, field: str) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    fields = {"response_format": form} if field == "response_format" else {"tools": [tool], "tool_choice": "required"}
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": MESSAGES, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field) and "cannot be compiled" in error["message"]


@pytest.mark.slow
def test_the_client_gets_vectors_and_tokens(url: str) -> None:
    with Client(url) as client:
        vectors = client.embed(["the model", "x"])
        assert [round(sum(each * each for each in vector), 4) for vector in vectors] == [1, 1]
        assert len(vectors[0]) == 64 and vectors[0] != vectors[1]
        assert client.detokenize(client.tokenize("the model")) == "the model"

    async def asked() -> None:
        async with AsyncClient(url) as client:
            assert await client.embed("x") == vectors[1:]
            assert await client.detokenize(await client.tokenize("x y")) == "x y"

    asyncio.run(asked())


@pytest.mark.slow
def test_another_media_type_is_415(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content="{}", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


# What JSON Schema cannot say either: how long a text is in tokens, and which schemas can be compiled.
BEYOND_SCHEMAS = re.compile("over the context|cannot be compiled|choices held at once")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_any_request_gets_what_the_page_says(url: str, mode: str) -> None:
    assert schemathesis_hooks.map_body
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    chosen = schemathesis.GenerationMode(mode)
    for result in api.get_all_operations():
        operation = result.ok()
        if mode == "negative" and not (operation.body or list(operation.iter_parameters())):
            continue  # nothing can be wrong

        @settings(
            max_examples=25,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            phases=[Phase.generate],
        )
        @given(operation.as_strategy(generation_mode=chosen))
        def holds(case: Any) -> None:
            response = case.call()
            try:
                case.validate_response(response)
            except FailureGroup as group:
                for failure in group.exceptions:
                    if not (isinstance(failure, RejectedPositiveData) and BEYOND_SCHEMAS.search(response.text)):
                        raise

        holds()
