"""Deltas as OpenAI's answers: whole ones and stream chunks, of the completions and the chat route."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from raymodels.serve.engine import Delta, Token
from raymodels.serve.schema import ChatRequest, CompletionRequest, Request

Json = dict[str, Any]


class Usage:
    """Counts tokens, exactly: of prompts as encoded, of answers as generated, whether or not they became text."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._generated: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        self._generated[delta.choice] = max(delta.generated, self._generated.get(delta.choice, 0))

    @property
    def completion_tokens(self) -> int:
        return sum(self._generated.values())

    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Answer(Protocol):
    """How one request is answered; `whole` and `chunk` are alternatives."""

    def opening(self) -> list[Json]:
        """Chunks to send before any text."""

    def chunk(self, delta: Delta) -> Json: ...

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
        self._frame = _frame("chatcmpl", "chat.completion", request.model)
        self._chunk_frame = self._frame | {"object": "chat.completion.chunk"}
        self._null_usage = _null_usage(request)

    def opening(self) -> list[Json]:
        return [
            self._piece(choice, {"role": "assistant", "content": ""}, None, None) for choice in range(self._choices)
        ]

    def chunk(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text else {}
        return self._piece(delta.choice, content, self._chat_logprobs(delta), delta.finish)

    def usage_chunk(self, usage: Usage) -> Json:
        return self._chunk_frame | {"choices": [], "usage": usage.body()}

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        choices = [
            {
                "index": delta.choice,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._chat_logprobs(delta),
                "finish_reason": delta.finish,
            }
            for delta in joined(deltas)
        ]
        return self._frame | {"choices": choices, "usage": usage.body()}

    def _piece(self, choice: int, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        piece = {"index": choice, "delta": content, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk_frame | {"choices": [piece]} | self._null_usage

    def _chat_logprobs(self, delta: Delta) -> Json | None:
        if not self._logprobs:
            return None
        entries = []
        for token in delta.tokens:
            top = [_chat_token(other.raw, other.logprob) for other in token.top]
            entries.append(_chat_token(token.raw, token.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}


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
        "tokens": [_name(token.raw) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_name(other.raw): other.logprob for other in token.top}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_token(raw: bytes, logprob: float | None) -> Json:
    return {"token": _name(raw), "logprob": logprob, "bytes": list(raw)}


def _name(raw: bytes) -> str:
    """The token as text, or as OpenAI writes one that is no whole character: ``bytes:\\xe2\\x82``."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
