"""What the bodies of all requests share: how strictly types are taken, what null means, and how much a body may hold.

Of a body with many faults only the first is looked for: the errors of millions of items would take gigabytes. And a
request holds few objects however large it is, as each costs its time wherever the request is read, sent or taken.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
LIMIT = "x-limit"
"""Marks what only a model can bound, such as its context: the OpenAPI page writes the bound there."""
SCHEMA_DEPTH = 64
"""Levels that a JSON schema may be nested."""
MAX_DEPTH = 100
"""Levels that a body may be nested, whatever is in it: less than any code that goes down them can take."""
MAX_TOKEN_IDS = 2**20
"""In one request, all its prompts together."""
MAX_TEXTS = 2**14
"""Prompts or texts of one request."""
MAX_VALUES = 2**16
"""Numbers, strings, lists and objects in a request's JSON schemas."""


def _stop_at_first(schema: Any) -> None:
    """Have every list of a schema end at its first wrong item."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = [item for key, item in schema.items() if key != "metadata"]
    if isinstance(schema, list | tuple):
        for item in schema:
            _stop_at_first(item)


class Wire(BaseModel):
    """Types are taken literally: "5" is no number, NaN is none either. Null means that a known field is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = _names(cls)
            unknown = next((key for key in value if key not in known), None)  # the first is enough to be refused
            meant = {key: _whole(item) for key, item in value.items() if item is not None and key in known}
            return meant if unknown is None else {unknown: value[unknown]} | meant
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first(schema)
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema.get("properties", {}).items():
            field.pop("title", None)
            if name not in schema.get("required", []):
                schema["properties"][name] = _nullable(field)
        return schema


def _whole(value: Any) -> Any:
    """JSON knows no integers: 2.0 is one."""
    if isinstance(value, list):
        return [_whole(item) for item in value] if not {float, list}.isdisjoint(map(type, value)) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache
def _names(kind: type[Wire]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """The field's schema with null as one more value."""
    field = {key: value for key, value in field.items() if key != "default"}
    null = {"type": "null"}
    if not field.keys() - {"description"}:
        return field  # anything goes, null too
    if "anyOf" in field:
        return field | {"anyOf": [*(option for option in field["anyOf"] if option != null), null]}
    return {"anyOf": [field, null]}


def limit(name: str) -> dict[str, Any]:
    """Marks a field whose bound depends on the model."""
    return {LIMIT: name}


def values(value: Any, depth: int = MAX_DEPTH) -> int | None:
    """How many values there are in a value of JSON, itself not counted; none if it is nested deeper."""
    level, count = [value], 0
    for _ in range(depth + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return count
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        count += len(level)
    return None


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    count = values(schema, SCHEMA_DEPTH)
    if count is None:
        raise ValueError(f"a JSON schema may be nested {SCHEMA_DEPTH} levels deep")
    if count > MAX_VALUES:
        raise ValueError(f"a JSON schema may hold {MAX_VALUES:,} values, not {count:,}")
    return schema


def _few(lists: list[list[int]]) -> list[list[int]]:
    if sum(map(len, lists)) > MAX_TOKEN_IDS:
        raise ValueError(f"there may be {MAX_TOKEN_IDS:,} token ids in all")
    return lists


IGNORED = WithJsonSchema({"description": "Does not change the answer."})
Ignored = Annotated[Any, BeforeValidator(lambda _: None), IGNORED]
"""A field that any value may have."""
JsonSchema = Annotated[dict[str, Any], AfterValidator(_shallow)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra=limit("vocabulary"))]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS), AfterValidator(_few)]
Some = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
Model = Annotated[str, Field(json_schema_extra=limit("models"))]
