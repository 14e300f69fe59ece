"""What these tests ask, by either route, and how they read what comes back."""

from __future__ import annotations

import json
from typing import Any

import openai

ROUTES = ["completions", "chat"]
MAX_BODY = 50_000
PROMPT = "the model reads a line"
GREEDY = {"temperature": 0, "max_tokens": 16}
SURROGATE = "\ud800"
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "exact": {"type": "boolean"}},
    "required": ["city", "exact"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "local_time", "parameters": PLACE}},
]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}


def ask(ai: openai.OpenAI, route: str, **fields: Any) -> Any:
    """One prompt to either route."""
    if route == "chat":
        given = {"messages": [{"role": "user", "content": PROMPT}], **fields}
        return ai.chat.completions.create(model="tiny", **given)
    return ai.completions.create(model="tiny", **{"prompt": PROMPT, **fields})


def text_of(choice: Any) -> str:
    """What a choice says, or what it adds in a stream."""
    if hasattr(choice, "delta"):
        return choice.delta.content or ""
    return choice.message.content if hasattr(choice, "message") else choice.text


def said(ai: openai.OpenAI, route: str, **fields: Any) -> str:
    return text_of(ask(ai, route, **fields).choices[0])


def logprobs_of(route: str, choice: Any) -> list[tuple[str, float, list[float]]]:
    """Every new token with its log-probability and those of its alternatives."""
    found = choice.logprobs
    if route == "chat":
        return [(each.token, each.logprob, [top.logprob for top in each.top_logprobs]) for each in found.content]
    tops = [list(top.values()) for top in found.top_logprobs]
    return list(zip(found.tokens, found.token_logprobs, tops, strict=True))


def send(ai: openai.OpenAI, route: str, **fields: Any) -> object:
    """As `ask`, with characters escaped: the client's own JSON cannot hold a lone surrogate."""
    path = "/chat/completions" if route == "chat" else "/completions"
    body = json.dumps({"model": "tiny", **({"prompt": PROMPT} if route == "completions" else {}), **fields})
    options: Any = {"headers": {"Content-Type": "application/json"}}
    return ai.post(path, cast_to=object, content=body.encode(), options=options)
