"""Requests for structured output: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from deltazip_deployments.openai.strict import Strict
from deltazip_ray.scheduler.request import Structure

MAX_CHOICES = 1024

_Schema = dict[str, Any] | bool


class _TextFormat(Strict):
    type: Literal["text"]

    def structure(self) -> Structure | None:
        return None


class _ObjectFormat(Strict):
    type: Literal["json_object"]

    def structure(self) -> Structure | None:
        return Structure("json")


class _NamedSchema(Strict):
    name: str
    description: str | None = None
    strict: bool | None = None
    json_schema: _Schema = Field(alias="schema")


class _SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: _NamedSchema

    def structure(self) -> Structure | None:
        return Structure("json_schema", json.dumps(self.json_schema.json_schema))


ResponseFormat = Annotated[_TextFormat | _ObjectFormat | _SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """Exactly one of the fields must be set."""

    json_schema: _Schema | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if len([value for value in self.__dict__.values() if value is not None]) != 1:
            raise ValueError("takes exactly one of json, json_object, regex, grammar, choice")
        return self

    def structure(self) -> Structure:
        """The structure that the output must match."""
        if self.regex is not None:
            return Structure("regex", self.regex)
        if self.grammar is not None:
            return Structure("grammar", self.grammar)
        if self.choice is not None:
            return Structure("choice", json.dumps(self.choice))
        if self.json_object:
            return Structure("json")
        given = self.json_schema
        return Structure("json_schema", given if isinstance(given, str) else json.dumps(given))
