"""`response_format` of a chat, and `text.format` of a response: what the answer must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.http.schemas import Body

SchemaName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = Annotated[dict[str, Any], Field(description="A JSON schema.")]


class PlainText(Body):
    """Any text."""

    type: Literal["text"]


class JsonObject(Body):
    """A JSON object; tell the model which, for nothing else does."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema and what it is called."""

    name: SchemaName
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema in any case.")


class JsonSchema(Body):
    """JSON of a schema, as `response_format` has it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatJsonSchema(NamedSchema):
    """JSON of a schema, as `text.format` has it."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]
TextFormat = Annotated[PlainText | JsonObject | FlatJsonSchema, Field(discriminator="type")]


def schema_of(asked: PlainText | JsonObject | JsonSchema | FlatJsonSchema | None) -> Mapping[str, Any] | None:
    """JSON schema of the answer; None if it may be any text."""
    match asked:
        case None | PlainText():
            return None
        case JsonObject():
            return {"type": "object"}
        case JsonSchema():
            return asked.json_schema.schema_ or {}
        case _:
            return asked.schema_ or {}
