"""The wire: requests and errors of OpenAI's completions and chat routes, checked field by field.

`read_completion` and `read_chat` turn a decoded JSON body into a request, or raise `Refused` with the field at fault.
What is harmless is ignored, what would change the answer and is not supported is refused, and null means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
RETRY_AFTER_S = 1

IGNORED = frozenset(
    ["user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"]
)
"""Fields that do not change the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that would change the answer, and the values of them that do not."""


class Problem(BaseModel):
    """What the ``error`` object of an answer says, and the status that goes with it."""

    model_config = ConfigDict(frozen=True)

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
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
        super().__init__(problem.message)
        self.problem = problem


class Wire(BaseModel):
    """Types are taken literally: "5" is no number, and NaN is none either."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: never added here


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class GenerationRequest(Wire):
    """What both routes share."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str]) -> str | list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        if "" in stops:
            raise ValueError("a stop string may not be empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: Any) -> Any:
        if prompt == []:
            raise ValueError("the list of prompts is empty")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ContentPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn of a conversation. Content given in parts is joined."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)


Request = CompletionRequest | ChatRequest
Kind = TypeVar("Kind", CompletionRequest, ChatRequest)


def read_completion(body: Any) -> CompletionRequest:
    """Check the body of ``POST /v1/completions``.

    Raises:
        Refused: names the field.
    """
    request = _read(body, CompletionRequest)
    if request.max_tokens == 0 and not request.echo:
        raise _refused("max_tokens: 0 new tokens leave nothing to answer without echo", "max_tokens")
    return request


def read_chat(body: Any) -> ChatRequest:
    """Check the body of ``POST /v1/chat/completions``.

    Raises:
        Refused: names the field.
    """
    request = _read(body, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise _refused("top_logprobs: set logprobs to true as well", "top_logprobs")
    return request


def _read(body: Any, kind: type[Kind]) -> Kind:
    if not isinstance(body, dict):
        raise _refused(f"the body must be a JSON object, not {type(body).__name__}", None)
    fields = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    for key in fields.keys() & UNSUPPORTED.keys():
        if fields.pop(key) not in UNSUPPORTED[key]:
            raise _refused(f"{key} is not supported by this server: leave it out", key)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _of(error, fields) from None


def _of(error: ValidationError, fields: dict[str, Any]) -> Refused:
    item = error.errors()[0]
    field = str(item["loc"][0])
    if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
        return _refused(f"unrecognized request argument: {field}", field)
    if item["type"] == "missing" and len(item["loc"]) == 1:
        return _refused(f"{field} is missing", field)
    if field == "prompt" and fields["prompt"] != []:
        return _refused("prompt must be a string, a list of strings, token ids, or a list of token id lists", field)
    if field == "stop" and item["type"] != "value_error":
        return _refused("stop must be a string or a list of strings", field)
    # The names of union members are in pydantic's path but not in the request.
    path = ".".join(str(part) for part in item["loc"] if part != "str" and "[" not in str(part))
    return _refused(f"{path}: {item['msg'].removeprefix('Value error, ')}", field)


def _refused(message: str, param: str | None) -> Refused:
    return Refused(Problem(status=400, message=message, param=param))
