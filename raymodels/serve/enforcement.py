"""Which of a chat's schemas its answer is decoded under, and which is at fault where that is impossible.

A schema that an answer must match is refused if it cannot be enforced. A tool that a model only may call is offered all
the same, and any JSON object is a call to it.
"""

from __future__ import annotations

import json
from typing import Any

from raymodels.serve.conversation import Tool
from raymodels.serve.engine import Engine, Grammar, InvalidRequest, QueueFull
from raymodels.serve.grammar_rules import DEFINITIONS, LATE
from raymodels.serve.schema import ChatRequest
from raymodels.serve.tools import grammar_of

NAMED = 8
"""Tools not enforced that are named; where there are more, they are "tools"."""
PROPERTIES = 64
"""Most properties of a tool of which the one at fault is looked for."""
NAME = 64
"""Characters of a property's name that are told."""

Schema = dict[str, Any]


async def enforced(request: ChatRequest, tagged: bool, engine: Engine) -> tuple[Grammar | None, tuple[str, ...]]:
    """The grammar of a chat's answer, compiled, and the fields that it leaves out.

    Args:
        tagged: as for `grammar_of`.

    Raises:
        InvalidRequest: what the answer must match cannot be enforced; names it.
        QueueFull: as `Engine.compile`.
    """
    grammar = grammar_of(request, tagged)
    if grammar is None:
        return None, ()
    if grammar.kind == "json_schema":
        try:
            return await engine.compile(grammar), ()
        except InvalidRequest as error:
            raise InvalidRequest(str(error), "response_format") from None
    if request.json_schema is not None and not request.must_call:
        await _check_format(request.json_schema, engine)
    # One by one: a text could begin a call to a tool whose arguments it could never end.
    tools = request.callable_tools
    faults = await engine.faults([_alone(_parameters(tool)) for tool in tools])
    bad = [tool for tool, fault in zip(tools, faults, strict=True) if fault]
    if bad and request.must_call:
        raise await _refusal(bad[0], next(filter(None, faults)), engine)
    try:
        grammar = await engine.compile(_without(request, bad, tagged))
    except InvalidRequest as error:
        if request.must_call:
            raise InvalidRequest(f"the tools together: {error}", "tools") from None
        bad = tools
        grammar = await engine.compile(_without(request, bad, tagged))
    names = [_field(tool) for tool in bad]
    return grammar, tuple(names) if len(names) <= NAMED else ("tools",)


async def _check_format(schema: Schema, engine: Engine) -> None:
    [fault] = await engine.faults([_alone(schema)])
    if fault:
        raise InvalidRequest(_message(fault), "response_format")


async def _refusal(tool: Tool, fault: str, engine: Engine) -> InvalidRequest:
    """Of a tool that must be called: names it, and its property, if that alone is at fault."""
    name, properties = tool.function.name, tool.function.parameters.get("properties")
    names = list(properties) if isinstance(properties, dict) and len(properties) <= PROPERTIES else []
    for each, why in zip(names, await engine.faults([_alone(_property(tool, each)) for each in names]), strict=True):
        if why and why != LATE:
            field = f"{_field(tool)}.properties.{each[:NAME]}"
            return InvalidRequest(f"tool {name!r}, property {each[:NAME]!r}: {_message(why)}", field)
    return InvalidRequest(f"tool {name!r}: {_message(fault)}", _field(tool))


def _message(fault: str) -> str:
    if fault == LATE:
        raise QueueFull(f"{fault}: try again later")
    return f"the JSON schema cannot be compiled: {fault}"


def _without(request: ChatRequest, unenforced: list[Tool], tagged: bool) -> Grammar:
    """The grammar of an answer in which calls to some tools have any object as arguments."""
    tools = [_free(tool) if tool in unenforced else tool for tool in request.tools]
    grammar = grammar_of(request.model_copy(update={"tools": tools}), tagged)
    assert grammar is not None
    return grammar


def _free(tool: Tool) -> Tool:
    return tool.model_copy(update={"function": tool.function.model_copy(update={"parameters": {}})})


def _alone(schema: Schema) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def _parameters(tool: Tool) -> Schema:
    return tool.function.parameters | {"type": "object"}


def _property(tool: Tool, name: str) -> Schema:
    parameters = tool.function.parameters
    definitions = {key: parameters[key] for key in DEFINITIONS if key in parameters}
    properties = {name: parameters["properties"][name]}
    return definitions | {"type": "object", "properties": properties, "required": [name]}


def _field(tool: Tool) -> str:
    return f"tools.{tool.function.name}.parameters"
