"""Deltas as OpenAI's answers: whole ones and stream chunks, of the completions and the chat route."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from raymodels.serve.engine import Delta, Token
from raymodels.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Request
from raymodels.serve.tools import ToolReader

Json = dict[str, Any]


class Usage:
    """Counts tokens, exactly: of prompts as encoded, of answers as generated, whether or not they became text.

    Args:
        cached_tokens: tokens of the prompts that were not computed again; none if the engine does not count them.
    """

    def __init__(self, prompt_tokens: int, cached_tokens: int | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self._generated: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        self._generated[delta.choice] = max(delta.generated, self._generated.get(delta.choice, 0))

    @property
    def completion_tokens(self) -> int:
        return sum(self._generated.values())

    def body(self) -> Json:
        counts: Json = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return counts


class Answer(Protocol):
    """How one request is answered; `whole` and `chunk` are alternatives."""

    def opening(self) -> list[Json]:
        """Chunks to send before any text."""

    def chunk(self, delta: Delta) -> Json | None:
        """None where there is nothing to send yet."""

    def usage_chunk(self, usage: Usage) -> Json: ...

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json: ...


def answer_to(request: Request) -> Answer:
    return ChatAnswer(request) if isinstance(request, ChatRequest) else CompletionAnswer(request)


class CompletionAnswer:
    def __init__(self, request: CompletionRequest) -> None:
        self._logprobs = request.logprobs is not None
        self._frame = _frame("cmpl", "text_completion", request.model)
        self._null_usage = _null_usage(request)

    def opening(self) -> list[Json]:
        return []

    def chunk(self, delta: Delta) -> Json:
        return self._frame | {"choices": [self._choice(delta)]} | self._null_usage

    def usage_chunk(self, usage: Usage) -> Json:
        return self._frame | {"choices": [], "usage": usage.body()}

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        return self._frame | {"choices": [self._choice(delta) for delta in joined(deltas)], "usage": usage.body()}

    def _choice(self, delta: Delta) -> Json:
        logprobs = _completion_logprobs([*delta.prompt, *delta.tokens]) if self._logprobs else None
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}


class ChatAnswer:
    def __init__(self, request: ChatRequest) -> None:
        self._logprobs = request.logprobs
        self._choices = request.n
        self._tools = request.callable_tools
        self._readers = [ToolReader(self._tools) for _ in range(request.n)] if self._tools else []
        self._frame = _frame("chatcmpl", "chat.completion", request.model)
        self._chunk_frame = self._frame | {"object": "chat.completion.chunk"}
        self._null_usage = _null_usage(request)

    def opening(self) -> list[Json]:
        return [
            self._piece(choice, {"role": "assistant", "content": ""}, None, None) for choice in range(self._choices)
        ]

    def chunk(self, delta: Delta) -> Json | None:
        content, calls = delta.text, list[Json]()
        finish: str | None = delta.finish
        if self._readers:
            reader = self._readers[delta.choice]
            content, calls = reader.read(delta.text, last=finish is not None)
            finish = _finish(delta, reader)
        logprobs = self._chat_logprobs(delta)
        if not (content or calls or finish or (logprobs and logprobs["content"])):
            return None
        gained: Json = ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})
        return self._piece(delta.choice, gained, logprobs, finish)

    def usage_chunk(self, usage: Usage) -> Json:
        return self._chunk_frame | {"choices": [], "usage": usage.body()}

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        choices = [self._choice(delta) for delta in joined(deltas)]
        return self._frame | {"choices": choices, "usage": usage.body()}

    def _choice(self, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        finish: str | None = delta.finish
        if self._tools:
            reader = ToolReader(self._tools)
            content, calls = reader.read(delta.text, last=True)
            if calls:
                called = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
                message |= {"content": content if content.strip() else None, "tool_calls": called}
            finish = _finish(delta, reader)
        logprobs = self._chat_logprobs(delta)
        return {"index": delta.choice, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _piece(self, choice: int, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        piece = {"index": choice, "delta": content, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk_frame | {"choices": [piece]} | self._null_usage

    def _chat_logprobs(self, delta: Delta) -> Json | None:
        if not self._logprobs:
            return None
        entries = []
        for token in delta.tokens:
            if token.end:  # a completion lists it, as lm-eval and OpenAI's older models expect; a chat does not
                continue
            top = [_chat_token(other.raw, other.logprob) for other in token.top]
            entries.append(_chat_token(token.raw, token.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}


def embeddings(request: EmbeddingRequest, vectors: list[list[float]], prompt_tokens: int) -> Json:
    """The answer to ``POST /v1/embeddings``; base64 is of little-endian 32-bit floats."""
    base = request.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if base else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _finish(delta: Delta, reader: ToolReader) -> str | None:
    return "tool_calls" if delta.finish == "stop" and reader.calls else delta.finish


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta per choice, holding all that its deltas held, in order of the choices."""
    parts: dict[int, list[Delta]] = {}
    for delta in deltas:
        parts.setdefault(delta.choice, []).append(delta)
    return [
        Delta(
            choice=choice,
            text="".join(part.text for part in own),
            generated=own[-1].generated,
            tokens=tuple(token for part in own for token in part.tokens),
            finish=own[-1].finish,
            prompt=tuple(token for part in own for token in part.prompt),
        )
        for choice, own in sorted(parts.items())
    ]


def _frame(prefix: str, kind: str, model: str) -> Json:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _null_usage(request: Request) -> Json:
    """With include_usage, every chunk but the last says that its usage is null."""
    options = request.stream_options
    return {"usage": None} if request.stream and options and options.include_usage else {}


def _completion_logprobs(tokens: list[Token]) -> Json:
    return {
        "tokens": [token_name(token.raw) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _top(token: Token) -> Json | None:
    """The likeliest tokens, and the one that stands here, which may make one more than asked for."""
    if token.logprob is None:
        return None
    return {token_name(other.raw): other.logprob for other in token.top} | {token_name(token.raw): token.logprob}


def _chat_token(raw: bytes, logprob: float | None) -> Json:
    return {"token": token_name(raw), "logprob": logprob, "bytes": list(raw)}


def token_name(raw: bytes) -> str:
    """The token as text, or as OpenAI writes one that is no whole character: ``bytes:\\xe2\\x82``."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
