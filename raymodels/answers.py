"""What a client asks for and what it gets: options as typed keywords, results as frozen values.

Fields that a newer server adds to its answers are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict

Prompt = str | list[int] | list[str] | list[list[int]]


class Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Model(Result):
    id: str
    created: int = 0
    owned_by: str = ""


class ModelList(Result):
    data: tuple[Model, ...]


class Usage(Result):
    """Counts of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Logprobs(Result):
    """Per token; the first one of an echoed prompt has no log-probability."""

    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    top_logprobs: tuple[dict[str, float] | None, ...] | None = None
    text_offset: tuple[int, ...] = ()


class TopLogprob(Result):
    token: str
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: tuple[TopLogprob, ...] = ()


class ChatLogprobs(Result):
    content: tuple[TokenLogprob, ...] | None = None


class Choice(Result):
    index: int = 0
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Function(Result):
    """What is called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Result):
    id: str
    type: str = "function"
    function: Function


class Message(Result):
    role: str
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None


class ChatChoice(Result):
    index: int = 0
    message: Message
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.message.content or ""


class Completion(Result):
    id: str
    model: str
    created: int = 0
    choices: tuple[Choice, ...]
    usage: Usage = Usage()

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class ChatCompletion(Result):
    id: str
    model: str
    created: int = 0
    choices: tuple[ChatChoice, ...]
    usage: Usage = Usage()

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class Embedding(Result):
    index: int = 0
    embedding: tuple[float, ...]


class EmbeddingList(Result):
    data: tuple[Embedding, ...]


class Tokens(Result):
    """``token_strs``, if asked for, shows each token; part of a character as ``bytes:`` and hexadecimal digits."""

    tokens: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] | None = None


class Detokenized(Result):
    prompt: str


class FunctionPart(Result):
    name: str | None = None
    arguments: str = ""


class ToolCallPart(Result):
    """A piece of the call number ``index``: the first has its id and name, all have some of its arguments."""

    index: int
    id: str | None = None
    function: FunctionPart


class Delta(Result):
    """One piece of a stream: some text or calls of choice ``index``, its end, or the usage of the whole request."""

    index: int = 0
    text: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    finish_reason: str | None = None
    logprobs: Logprobs | ChatLogprobs | None = None
    usage: Usage | None = None


class Sampling(TypedDict, total=False):
    """What may be asked of every generation. What is left out is the server's default."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    n: int
    stop: str | list[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]


class CompletionOptions(Sampling, total=False):
    """``logprobs`` is how many alternatives to give per token; ``echo`` puts the prompt before the text."""

    logprobs: int
    echo: bool


class ChatOptions(Sampling, total=False):
    """``response_format``, ``tools`` and ``tool_choice`` as in OpenAI's API."""

    logprobs: bool
    top_logprobs: int
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool


class StreamOptions(Sampling, total=False):
    """A completion's or a chat's, by what is streamed."""

    logprobs: int | bool
    top_logprobs: int
    echo: bool
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
