"""What the bodies of all requests share: how strictly types are taken, and what null means."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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


class Wire(BaseModel):
    """Types are taken literally: "5" is no number, NaN is none either. Null means that a known field is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: _whole(item) for key, item in value.items() if item is not None or not cls._knows(key)}
        return value

    @classmethod
    def _knows(cls, key: str) -> bool:
        return any(key == (field.alias or name) for name, field in cls.model_fields.items())

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
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH):
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return schema
    raise ValueError(f"a JSON schema may be nested {SCHEMA_DEPTH} levels deep")


IGNORED = WithJsonSchema({"description": "Does not change the answer."})
Ignored = Annotated[Any, BeforeValidator(lambda _: None), IGNORED]
"""A field that any value may have."""
JsonSchema = Annotated[dict[str, Any], AfterValidator(_shallow)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra=limit("vocabulary"))]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Some = Annotated[list[str], Field(min_length=1)]
Model = Annotated[str, Field(json_schema_extra=limit("models"))]
