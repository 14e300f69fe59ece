"""The wire: requests and errors of OpenAI's routes and of those around the tokenizer, checked field by field.

The ``read_*`` functions turn a decoded JSON body into a request, or raise `Refused` with the field at fault. What is
harmless is ignored, what would change the answer and is not supported is refused, and null means the default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raymodels.serve.conversation import (
    JsonObjectFormat,
    JsonSchemaFormat,
    Messages,
    NamedTool,
    ResponseFormat,
    TextFormat,
    Tool,
    ToolChoice,
    Tools,
)
from raymodels.serve.wire import (
    MAX_TEXTS,
    MAX_TOKEN_IDS,
    Ignored,
    ManyTokenIds,
    Model,
    Some,
    TokenId,
    TokenIds,
    Wire,
    limit,
)

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
RETRY_AFTER_S = 1

TOKEN_KEY = r"^(0|[1-9][0-9]{0,9})$"
MAX_BIAS = 100
MAX_SHOWN = 1000
"""Characters of what a client has sent that an error's message may repeat."""


def _shown(text: str) -> str:
    """A text that can be sent, and is no longer than one that is read."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return short.encode("utf-8", "backslashreplace").decode()


Shown = Annotated[str, AfterValidator(_shown)]


class Problem(BaseModel):
    """What the ``error`` object of an answer says, and the status that goes with it."""

    model_config = ConfigDict(frozen=True)

    status: int
    message: Shown
    type: str = "invalid_request_error"
    param: Shown | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        return {"error": self.model_dump(include={"message", "type", "param", "code"})}


def overloaded(message: str) -> Problem:
    """The answer at a limit that passes."""
    return Problem(
        status=429, message=message, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=RETRY_AFTER_S
    )


class Refused(Exception):
    """Ends a request with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # all of it, so that it survives pickling
        self.problem = problem

    def __str__(self) -> str:
        return self.problem.message


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="padding against traffic analysis: never added here")


Stop = Annotated[str, Field(min_length=1)]


def _first_bias(given: Any) -> Any:
    """What is wrong first alone, for pydantic to say what, where there are many."""
    if not isinstance(given, dict):
        return given
    is_id = re.compile(TOKEN_KEY, re.ASCII).fullmatch
    for key, bias in given.items():
        if not is_id(key) or type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            return {key: bias}
    return given


Bias = Annotated[
    dict[Annotated[str, Field(pattern=TOKEN_KEY)], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    BeforeValidator(_first_bias),
]
NoText = Annotated[str, Field(max_length=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class GenerationRequest(Wire):
    """What both routes share."""

    model: Model
    n: int = Field(1, ge=1, le=MAX_CHOICES, json_schema_extra=limit("choices"))
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1 leave all tokens in")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Bias = Field(
        {}, json_schema_extra={"additionalProperties": False} | limit("token keys"), description="by id"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="choice i draws from seed + i")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = Field([])
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _implies(field: dict[str, Any], needs: dict[str, Any]) -> dict[str, Any]:
    """A rule between two fields, for the page."""
    return {
        "if": {"properties": field, "required": list(field)},
        "then": {"properties": needs, "required": list(needs)},
    }


def _both(*fields: str) -> dict[str, Any]:
    """Fields that are all given."""
    return {"properties": {field: {"not": {"type": "null"}} for field in fields}, "required": list(fields)}


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    model_config = ConfigDict(json_schema_extra=_implies({"max_tokens": {"const": 0}}, {"echo": {"const": True}}))

    prompt: str | Some | TokenIds | ManyTokenIds
    max_tokens: int | None = Field(None, ge=0, lt=2**31, json_schema_extra=limit("context"), description="default 16")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int = Field(1, ge=1, le=1)
    suffix: NoText = ""

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, each text or token ids."""
        return one_or_several(self.prompt)


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _implies({"top_logprobs": {"type": "integer", "minimum": 1}}, {"logprobs": {"const": True}}),
                _implies(
                    {"tool_choice": {"anyOf": [{"const": "required"}, {"type": "object"}]}},
                    {"tools": {"type": "array", "minItems": 1}},
                ),
                {"not": _both("max_tokens", "max_completion_tokens")},
            ]
        }
    )

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=2**31, json_schema_extra=limit("context"))
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, json_schema_extra=limit("context"))
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat = TextFormat(type="text")
    tools: Tools = Field([])
    tool_choice: ToolChoice | None = Field(None, description="default auto where there are tools")
    parallel_tool_calls: bool = True
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] = Field(["text"])
    functions: Nothing = Field([])
    function_call: Literal["none", "auto"] | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that this answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the content must match."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.json_schema
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None


class EmbeddingRequest(Wire):
    """``POST /v1/embeddings``."""

    model: Model
    input: Stop | Annotated[list[Stop], Field(min_length=1, max_length=MAX_TEXTS)] | TokenIds | ManyTokenIds
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, json_schema_extra=limit("dimensions"), description="the model's own")
    user: Ignored = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return one_or_several(self.input)


class TokenizeRequest(Wire):
    """``POST /tokenize`` of a text. Without ``model``, the only one served."""

    model: Model | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Wire):
    """``POST /tokenize`` of a conversation, as the chat route would encode it."""

    model: Model | None = None
    messages: Messages
    tools: Tools = Field([])
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    """``POST /detokenize``."""

    model: Model | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


Request = CompletionRequest | ChatRequest
Kind = TypeVar("Kind", bound=Wire)


def one_or_several(given: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def read_completion(body: Any) -> CompletionRequest:
    """Check the body of ``POST /v1/completions``.

    Raises:
        Refused: names the field.
    """
    request = _read(body, CompletionRequest)
    if request.max_tokens == 0 and not request.echo:
        raise refused("max_tokens: 0 new tokens leave nothing to answer without echo", "max_tokens")
    return request


def read_chat(body: Any) -> ChatRequest:
    """Check the body of ``POST /v1/chat/completions``.

    Raises:
        Refused: names the field.
    """
    request = _read(body, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise refused("top_logprobs: set logprobs to true as well", "top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise refused("max_tokens is the old name of max_completion_tokens: give one of them", "max_tokens")
    if request.must_call and not request.callable_tools:
        raise refused("tool_choice asks for a tool that tools does not have", "tool_choice")
    return request


def read_embedding(body: Any) -> EmbeddingRequest:
    """Check the body of ``POST /v1/embeddings``; raises as the others."""
    return _read(body, EmbeddingRequest)


def read_tokenize(body: Any) -> TokenizeRequest | TokenizeChatRequest:
    """Check the body of ``POST /tokenize``; raises as the others."""
    if isinstance(body, dict) and body.get("messages") is not None:
        return _read(body, TokenizeChatRequest)
    return _read(body, TokenizeRequest)


def read_detokenize(body: Any) -> DetokenizeRequest:
    """Check the body of ``POST /detokenize``; raises as the others."""
    return _read(body, DetokenizeRequest)


def refused(message: str, param: str | None) -> Refused:
    """A request that this server can never serve."""
    return Refused(Problem(status=400, message=message, param=param))


def _read(body: Any, kind: type[Kind]) -> Kind:
    if not isinstance(body, dict):
        raise refused(f"the body must be a JSON object, not {type(body).__name__}", None)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _of(error) from None


TEXTS = (
    "a string, a list of strings, token ids, or a list of token id lists, none of them empty, "
    f"{MAX_TEXTS:,} strings or lists and {MAX_TOKEN_IDS:,} token ids at most"
)
LISTS = {
    "prompt": TEXTS,
    "input": TEXTS,
    "stop": f"a string or a list of at most {MAX_STOPS} strings, none of them empty",
}
"""Fields of several forms, of which pydantic would report every one."""


def _of(error: ValidationError) -> Refused:
    item = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if not item["loc"]:
        return refused("a field's name holds a lone surrogate, which is no character", None)
    field = str(item["loc"][0])
    if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
        return refused(f"unrecognized request argument: {field}", field)
    if item["type"] == "missing" and len(item["loc"]) == 1:
        return refused(f"{field} is missing", field)
    if field in LISTS:
        return refused(f"{field} must be {LISTS[field]}", field)
    # The names of union members are in pydantic's path but not in the request.
    path = ".".join(str(part) for part in item["loc"] if part != "str" and "[" not in str(part))
    return refused(f"{path}: {item['msg'].removeprefix('Value error, ')}", field)
