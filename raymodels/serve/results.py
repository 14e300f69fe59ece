"""The answers on the wire, as the OpenAPI page describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Logprob = Annotated[float, Field(le=0)]


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Result):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Result):
    error: ErrorDetail


class PromptDetails(Result):
    cached_tokens: Count


class Usage(Result):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails | None = None


class CompletionLogprobs(Result):
    """Of every token; the first of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None]
    text_offset: list[Count]


class CompletionChoice(Result):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Result):
    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopToken(Result):
    token: str
    logprob: Logprob
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(Result):
    content: list[ChatToken]
    refusal: None


class CalledFunction(Result):
    name: str
    arguments: str


class Call(Result):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Result):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class ChatChoice(Result):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Result):
    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChunkChoice(CompletionChoice):
    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class CompletionChunk(Completion):
    """One event of a stream. The last one of ``include_usage`` has no choices and the usage, the others null."""

    choices: list[CompletionChunkChoice]  # type: ignore[assignment]
    usage: Usage | None = None  # type: ignore[assignment]


class FunctionPart(Result):
    name: str | None = None
    arguments: str


class CallPart(Result):
    """The first part of a call has its id and name, all have a piece of its arguments."""

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPart


class Gained(Result):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPart] | None = None


class ChatChunkChoice(Result):
    index: Count
    delta: Gained
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(Result):
    """One event of a stream; usage as in a completion's."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class EmbeddingUsage(Result):
    prompt_tokens: Count
    total_tokens: Count


class Embedding(Result):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str = Field(description="as text: base64 of little-endian 32-bit floats")


class EmbeddingList(Result):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenized(Result):
    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Detokenized(Result):
    prompt: str


class TokenizerInfo(Result):
    model: str
    tokenizer_class: str
    vocab_size: Count
    max_model_len: Count
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class ModelInfo(Result):
    """A model without a replica, which nobody has asked for since the gateway began, has no ``root`` and so on."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    root: str | None
    parent: str | None
    max_model_len: Count | None
    has_chat_template: bool | None


class ModelList(Result):
    object: Literal["list"]
    data: list[ModelInfo]


class Health(Result):
    status: Literal["ok", "ready"]


class Unready(Result):
    status: Literal["unready"]
    models_without_replicas: list[str]
