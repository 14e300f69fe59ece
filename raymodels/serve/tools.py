"""Tool calls: what a model is told of tools, the grammar of its answer, and the calls read out of its text.

A call is a JSON object, ``{"name": NAME, "arguments": {...}}``. Models whose chat template mentions ``<tool_call>``
write it between these tags, as many calls as they like, after any text. Others write nothing but the object.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

import regex  # type: ignore[import-untyped]

from raymodels.serve.conversation import Tool
from raymodels.serve.engine import Grammar
from raymodels.serve.grammar_rules import json_rule
from raymodels.serve.schema import ChatRequest

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = r'\s*\{\s*"name"\s*:\s*"(?P<name>[a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
TAGGED_HEAD, TAGGED_TAIL = regex.compile(OPEN + HEAD), regex.compile(r"\s*\}\s*" + CLOSE)
PLAIN_HEAD, PLAIN_TAIL = regex.compile(HEAD), regex.compile(r"\s*\}")

Json = dict[str, Any]


def grammar_of(request: ChatRequest, tagged: bool) -> Grammar | None:
    """What every choice's text must match; none where it is free.

    Args:
        tagged: the model's chat template mentions ``<tool_call>``.
    """
    tools, schema = request.callable_tools, request.json_schema
    if tools and (tagged or request.must_call):
        return Grammar("lark", _lark(tools, tagged, request.must_call, request.parallel_tool_calls, schema))
    return Grammar("json_schema", json.dumps(schema)) if schema is not None else None


def _lark(tools: list[Tool], tagged: bool, forced: bool, several: bool, schema: Json | None) -> str:
    rules = ["call: " + " | ".join(f"call_{at}" for at in range(len(tools)))]
    for at, tool in enumerate(tools):
        head = json.dumps('{"name": ' + json.dumps(tool.function.name) + ', "arguments": ')
        rules.append(f'call_{at}: {head} arguments_{at} "}}"')
        rules.append(f"arguments_{at}: {json_rule(tool.function.parameters | {'type': 'object'})}")
    if not tagged:
        return "\n".join(["start: call", *rules])
    opening, closing = json.dumps(OPEN + "\n"), json.dumps("\n" + CLOSE)
    rules.append(f"body: call {closing}")
    rules.append(f"next: {opening} body")
    more = r' ("\n" next)*' if several else ""
    if forced:
        start = f"next{more}"
    elif schema is not None:
        start = f"content | next{more}"
        rules.append(f"content: {json_rule(schema)}")
    else:
        # A lazy lexeme ends where it first can: once the tag is written, a call follows and no more text.
        start = f"text | first{more}"
        rules += ["text: TEXT", r"TEXT: /(.|\n)*/", f"head[lazy]: TEXT {opening}", "first: head body"]
    return "\n".join([f"start: {start}", *rules])


def without_tool_roles(messages: list[Json], tools: Iterable[Tool]) -> list[Json]:
    """The conversation for a chat template that knows nothing of tools: their definitions and calls as text."""
    told: list[Json] = []
    for message in messages:
        calls = message.get("tool_calls", [])
        lines = [json.dumps({key: call["function"][key] for key in ("name", "arguments")}) for call in calls]
        content = "\n".join([message["content"], *lines] if message["content"] else lines or [""])
        told.append({key: value for key, value in message.items() if key != "tool_calls"} | {"content": content})
    definitions = [json.dumps(tool.plain()["function"]) for tool in tools]
    if definitions:
        form = 'To call one, answer with a JSON object alone: {"name": NAME, "arguments": {...}}.'
        told = [{"role": "system", "content": "\n".join(["You may call these functions.", form, *definitions])}, *told]
    return told


class ToolReader:
    """Reads one choice's text as it comes: what is content, and what is a call.

    Text that only looked like a call is content in the end, character for character.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.calls = 0
        self._names = {tool.function.name for tool in tools}
        self._held = ""
        self._read = self._start
        self._tail = PLAIN_TAIL
        self._last = False
        self._after_call = False

    def read(self, text: str, last: bool) -> tuple[str, list[Json]]:
        """Content, and the new parts of calls in OpenAI's form, at most one part for each call."""
        self._held, self._last = self._held + text, last
        self._content, self._parts = "", list[Json]()
        while self._read():
            pass
        content, self._content = self._content, ""
        return content, self._parts

    # Each of the methods below reads on from ``_held``. False: more text is needed.

    def _start(self) -> bool:
        """Before any text: a plain call can only be all there is."""
        if self._begins(PLAIN_HEAD, PLAIN_TAIL):
            return True
        if self._held and not self._waits(PLAIN_HEAD):
            self._read = self._text
            return True
        return self._give_up()

    def _text(self) -> bool:
        if self._after_call:
            self._held = self._held.lstrip()
            self._after_call = not self._held
        at = self._held.find(OPEN)
        if at >= 0:
            self._content += self._held[:at]
            self._held = self._held[at:]
            self._read = self._tag
            return True
        keep = 0 if self._last else _started(self._held, OPEN)
        self._content += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return False

    def _tag(self) -> bool:
        if self._begins(TAGGED_HEAD, TAGGED_TAIL):
            return True
        if not self._waits(TAGGED_HEAD):
            self._content, self._held = self._content + OPEN, self._held[len(OPEN) :]
            self._read = self._text
            return True
        return self._give_up()

    def _begins(self, head: regex.Pattern[str], tail: regex.Pattern[str]) -> bool:
        found = head.match(self._held)
        if found is None or found["name"] not in self._names:
            return False
        function = {"name": found["name"], "arguments": ""}
        call = {"index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self._parts.append(call)
        self._held = self._held[found.end() :]
        self.calls += 1
        self._depth, self._in_string, self._escaped = 0, False, False
        self._tail, self._read = tail, self._arguments
        return True

    def _waits(self, head: regex.Pattern[str]) -> bool:
        """Whether the text held may yet become a call to a tool there is."""
        found = head.fullmatch(self._held, partial=True)
        return found is not None and found.partial and not self._last

    def _arguments(self) -> bool:
        """Up to the brace that closes the one they begin with."""
        end = len(self._held)
        for at, character in enumerate(self._held):
            if self._in_string:
                self._in_string = character != '"' or self._escaped
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end = at + 1
                    self._read = self._close
                    break
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self._add(piece)
        return self._read == self._close

    def _add(self, piece: str) -> None:
        index = self.calls - 1
        if not self._parts or self._parts[-1]["index"] != index:
            self._parts.append({"index": index, "function": {"arguments": ""}})
        self._parts[-1]["function"]["arguments"] += piece

    def _close(self) -> bool:
        found = self._tail.fullmatch(self._held, partial=True)
        if found is not None and found.partial and not self._last:
            return False
        if found := self._tail.match(self._held):
            self._held = self._held[found.end() :]
        self._read, self._after_call = self._text, True
        return True

    def _give_up(self) -> bool:
        """At the end of the text nothing is held back any more."""
        if self._last and self._held:
            self._content, self._held = self._content + self._held, ""
        return False


def _started(text: str, tag: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
