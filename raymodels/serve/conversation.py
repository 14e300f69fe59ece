"""Conversations on the wire: messages by role, the tools a model may call, and the form its answer must have."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from raymodels.serve.wire import MAX_VALUES, NAME, Ignored, JsonSchema, Wire, values

MAX_TOOLS = 128
MAX_MESSAGES = 4096
"""Of one conversation, with the calls of tools in them."""


class ContentPart(Wire):
    type: Literal["text"]
    text: str


def _joined(content: str | list[ContentPart]) -> str:
    """Content given in parts as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


Content = Annotated[str | list[ContentPart], AfterValidator(_joined)]
"""Text, once it is read."""


class FunctionCall(Wire):
    name: str
    arguments: str = Field(description="a JSON object as text")


class ToolCall(Wire):
    """A call that the assistant has made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments are an object, unless they are none."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict) or values(arguments) is None:
            arguments = self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class PromptMessage(Wire):
    """What the assistant is told."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


class AssistantMessage(Wire):
    """What the assistant said or called. The fields that its own answers have may be sent back."""

    role: Literal["assistant"]
    content: Content = ""
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": self.content or self.refusal or ""}
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class ToolMessage(Wire):
    """What a call has returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        message = {"role": self.role, "content": self.content, "tool_call_id": self.tool_call_id}
        return message | ({"name": self.name} if self.name else {})


Message = Annotated[PromptMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _few_calls(messages: list[Message]) -> list[Message]:
    calls = sum(len(message.tool_calls or ()) for message in messages if isinstance(message, AssistantMessage))
    if len(messages) + calls > MAX_MESSAGES:
        raise ValueError(f"a conversation may have {MAX_MESSAGES:,} messages and calls of tools in all")
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_few_calls)]


class Function(Wire):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: JsonSchema = Field({})
    strict: bool = Field(False, description="arguments always match the parameters where calls are constrained")


class Tool(Wire):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": self.type, "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}


def _few_values(tools: list[Tool]) -> list[Tool]:
    count = sum(values(tool.function.parameters) or 0 for tool in tools)
    if count > MAX_VALUES:
        raise ValueError(f"the parameters of all tools may hold {MAX_VALUES:,} values, not {count:,}")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_few_values)]


class FunctionName(Wire):
    name: str = Field(pattern=NAME)


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(pattern=NAME)
    description: str | None = None
    json_schema: JsonSchema = Field(default={"type": "object"}, alias="schema")
    strict: bool = Field(False, description="the answer always matches the schema")


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
