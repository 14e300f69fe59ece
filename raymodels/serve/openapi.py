"""The OpenAPI page: every route, what it takes and all that it may answer, generated from the models of the wire.

What only a model can bound (names, contexts, vocabularies) is filled in from the models that are served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import raymodels
from raymodels.config import HttpConfig
from raymodels.serve import results
from raymodels.serve.replica import Description
from raymodels.serve.schema import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from raymodels.serve.wire import LIMIT

Json = dict[str, Any]
Kind = type[BaseModel]

JSON = "application/json"
REFS = "#/components/schemas/"
BIAS: Json = {"type": "number", "minimum": -100, "maximum": 100}
STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or unknown.",
    403: "The API key may not do this.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    429: "A limit is reached that passes.",
    500: "The server or the model's replica failed.",
    503: "No replica of the model is running.",
    504: "The request took longer than this server, or the header X-Request-Timeout, allows.",
}
KEYED = (401, 403, 429)
CALLING = (404, 503, 504)
REQUEST_ID: Json = {"X-Request-ID": {"schema": {"type": "string"}, "description": "that of the request, or a new one"}}
AUTHENTICATE: Json = {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}
RETRY_AFTER: Json = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}


@dataclass(frozen=True)
class Operation:
    """One route. ``bodies`` are alternatives, ``parameter`` is where a model's name stands, if not in the body."""

    method: str
    path: str
    summary: str
    answer: Kind | None = None
    bodies: tuple[Kind, ...] = ()
    chunk: Kind | None = None
    parameter: str | None = None
    calls: bool = True
    keyed: bool = True
    media: str = JSON


OPERATIONS = [
    Operation(
        "post",
        "/v1/completions",
        "Continue prompts.",
        results.Completion,
        (CompletionRequest,),
        results.CompletionChunk,
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation.",
        results.ChatCompletion,
        (ChatRequest,),
        results.ChatCompletionChunk,
    ),
    Operation("post", "/v1/embeddings", "Texts as vectors.", results.EmbeddingList, (EmbeddingRequest,)),
    Operation("get", "/v1/models", "The models served.", results.ModelList),
    Operation("get", "/v1/models/{model}", "One model.", results.ModelInfo, parameter="path"),
    Operation("post", "/tokenize", "A text as token ids.", results.Tokenized, (TokenizeRequest, TokenizeChatRequest)),
    Operation("post", "/detokenize", "Token ids as text.", results.Detokenized, (DetokenizeRequest,)),
    Operation("get", "/tokenizer_info", "What the tokenizer is.", results.TokenizerInfo, parameter="query"),
    Operation("get", "/healthz", "Whether the gateway lives.", results.Health, calls=False, keyed=False),
    Operation("get", "/readyz", "Whether every model has a replica.", results.Health, calls=False, keyed=False),
    Operation("get", "/metrics", "Figures for Prometheus.", calls=False, media="text/plain"),
    Operation("get", "/openapi.json", "This page.", calls=False),
]


def page(models: Mapping[str, Description | None], http: HttpConfig) -> Json:
    """The page of an endpoint.

    Args:
        models: name -> what serves it; none where nothing answers now.
    """
    keyed = http.keys_file is not None
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, list(models), keyed)
    components: Json = {"schemas": _schemas(models, http)}
    document = {
        "openapi": "3.2.0",
        "info": {"title": "raymodels", "version": raymodels.__version__},
        "paths": paths,
        "components": components,
    }
    if keyed:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(operation: Operation, models: list[str], keyed: bool) -> Json:
    described: Json = {
        "operationId": f"{operation.method}{operation.path.translate(str.maketrans('/{}', '___'))}",
        "summary": operation.summary,
        "responses": {"200": _success(operation)},
    }
    if operation.bodies:
        schemas = [_ref(body) for body in operation.bodies]
        schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if operation.parameter:
        described["parameters"] = [
            {
                "name": "model",
                "in": operation.parameter,
                "required": operation.parameter == "path" or len(models) != 1,
                "schema": {"type": "string"} | ({"enum": models} if models else {}),
            }
        ]
    if operation.path == "/readyz":
        described["responses"]["503"] = {
            "description": "Some model has no replica.",
            "content": {JSON: {"schema": _ref(results.Unready)}},
        }
    statuses = {
        *(400, 500),
        *((408, 413, 415) if operation.bodies else ()),
        *(CALLING if operation.calls else ()),
        *(KEYED if operation.keyed and keyed else ()),
        *((429,) if operation.bodies else ()),
    }
    for status in sorted(statuses):
        described["responses"][str(status)] = _failure(status)
    if operation.keyed and keyed:
        described["security"] = [{"bearer": []}]
    return described


def _success(operation: Operation) -> Json:
    schema = _ref(operation.answer) if operation.answer else {"type": "object" if operation.media == JSON else "string"}
    content: Json = {operation.media: {"schema": schema}}
    if operation.chunk is not None:
        event = {"contentMediaType": JSON, "contentSchema": {"anyOf": [_ref(operation.chunk), _ref(results.Error)]}}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, event]}
        item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"itemSchema": item}
    return {"description": "The answer.", "content": content, "headers": REQUEST_ID}


def _failure(status: int) -> Json:
    failure: Json = {"description": STATUSES[status], "content": {JSON: {"schema": _ref(results.Error)}}}
    headers: Json = {429: RETRY_AFTER, 503: RETRY_AFTER, 401: AUTHENTICATE}.get(status, {})
    return failure | {"headers": REQUEST_ID | headers}


def _ref(kind: Kind) -> Json:
    return {"$ref": REFS + kind.__name__}


def _schemas(models: Mapping[str, Description | None], http: HttpConfig) -> Json:
    kinds: list[Kind] = [results.Error, results.Unready]
    for operation in OPERATIONS:
        kinds += [kind for kind in (operation.answer, operation.chunk, *operation.bodies) if kind is not None]
    _, document = models_json_schema(
        [(kind, "validation") for kind in dict.fromkeys(kinds)], ref_template=REFS + "{model}"
    )
    schemas: Json = document["$defs"]
    chatting = {name: about for name, about in models.items() if about is None or about.has_chat_template} or models
    for name, schema in schemas.items():
        _fill(schema, _limits(chatting if name in ("ChatRequest", "TokenizeChatRequest") else models, http))
    return schemas


def _limits(models: Mapping[str, Description | None], http: HttpConfig) -> Json:
    """What stands where a schema says `LIMIT`: the widest bounds among the models."""
    limits: Json = {"models": {"enum": list(models)}} if models else {}
    known = [about for about in models.values() if about is not None]
    if known and len(known) == len(models):
        tokens = max(about.context for about in known) - 1  # the prompt has at least one
        vocabulary = max(about.vocabulary for about in known)
        limits["context"] = {"maximum": min(tokens, http.max_output_tokens or tokens)}
        limits["vocabulary"] = {"maximum": vocabulary - 1}
        limits["token keys"] = {"patternProperties": {_up_to(vocabulary - 1): BIAS}}
        limits["dimensions"] = {"enum": [*sorted({about.dimensions for about in known}), None]}
        limits["choices"] = {"maximum": min(MAX_CHOICES, max(about.choices for about in known))}
    return limits


def _up_to(most: int) -> str:
    """A regular expression for the decimal numbers from 0 to ``most``."""
    digits = str(most)
    shorter = [f"[1-9][0-9]{{{size}}}" for size in range(len(digits) - 1)]
    smaller = [
        f"{digits[:at]}[{0 if at else 1}-{int(digit) - 1}][0-9]{{{len(digits) - at - 1}}}"
        for at, digit in enumerate(digits)
        if int(digit) > (0 if at else 1)
    ]
    return f"^({'|'.join(dict.fromkeys(['0', *shorter, *smaller, digits]))})$"


def _fill(node: Any, limits: Json) -> None:
    if isinstance(node, dict):
        if isinstance(name := node.pop(LIMIT, None), str):
            node |= limits.get(name, {})
        for item in node.values():
            _fill(item, limits)
    elif isinstance(node, list):
        for item in node:
            _fill(item, limits)
