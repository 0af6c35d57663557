"""Rejects JSON schemas that xgrammar would not enforce completely: it silently ignores what it does not support."""

import json
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import unquote

from deltazip_ray.engine.structure.regexes import check_regexes
from deltazip_ray.errors import InvalidRequest

_MOST_NESTED = 32
_MOST_SCHEMAS = 512  # a bounded string alone can take a second to compile for a large vocabulary
_IGNORED = frozenset(
    {
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "then",
        "uniqueItems",
    }
)
_NOTES = frozenset(
    {
        "$comment",
        "$defs",
        "$id",
        "$schema",
        "default",
        "definitions",
        "deprecated",
        "description",
        "discriminator",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_ONE = ("additionalProperties", "items", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "patternProperties", "properties")


def check_schema(text: str) -> None:
    """Raise InvalidRequest for a schema that is not JSON, too deep, endless, or not completely enforced."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}") from error
    direct: dict[int, list[int]] = {}
    patterns: list[str] = []
    for where, schema in _schemas(root, "schema", 0):
        for complaint in (*_unenforced(schema), *_dangling(schema, root)):
            raise InvalidRequest(f"{where}: {complaint}")
        patterns += _patterns(schema)
        direct[id(schema)] = [id(other) for other in _stand_for(schema, root)]
        if len(direct) > _MOST_SCHEMAS:
            raise InvalidRequest(f"the schema has more than {_MOST_SCHEMAS} schemas in it: ask for less")
    check_regexes(*patterns)
    try:
        TopologicalSorter(direct).prepare()
    except CycleError as error:
        raise InvalidRequest(
            "the schema refers to itself with nothing between: it could be followed for ever"
        ) from error


def _schemas(schema: Any, where: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas inside a schema, except true and false, each with its location."""
    if depth > _MOST_NESTED:
        raise InvalidRequest(f"the schema is nested more than {_MOST_NESTED} deep: use $defs and $ref")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where} must be an object, true or false")
    yield where, schema
    for key, part in _parts(schema):
        yield from _schemas(part, f"{where}.{key}"[-200:], depth + 1)


def _unenforced(schema: Mapping[str, Any]) -> Iterator[str]:
    """Problems: keywords that would be ignored."""
    for key in sorted(_IGNORED & schema.keys()):
        if schema[key] not in (False, None):
            yield f"{key!r} is not enforced by structured output: leave it out"
    for key in _ALONE:
        others = schema.keys() - _NOTES - {key}
        if key in schema and others:
            yield f"{min(others)!r} is not enforced beside {key!r}: move it into what {key!r} names"
    if len(_of_type(schema, "allOf", list)) > 1:
        yield "'allOf' of several schemas is not enforced: merge them into one"
    if isinstance(schema.get("pattern"), str) and schema.keys() & {"minLength", "maxLength"}:
        yield "'minLength' and 'maxLength' are not enforced beside 'pattern': say it in the pattern"
    for name in _of_type(schema, "required", list):
        if name not in _of_type(schema, "properties", dict):
            yield f"'required' names {str(name)[:80]!r}, which is not among 'properties': add it"


def _patterns(schema: Mapping[str, Any]) -> Iterator[str]:
    """Its regular expressions."""
    if isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    yield from _of_type(schema, "patternProperties", dict)


def _dangling(schema: Mapping[str, Any], root: Any) -> Iterator[str]:
    """Problems: references without a target."""
    if "$ref" in schema and _target(schema["$ref"], root) is None:
        yield f"'$ref' {str(schema['$ref'])[:80]!r} leads nowhere: it must be a place in this schema, as '#/$defs/…'"


def _stand_for(schema: Mapping[str, Any], root: Any) -> Iterator[Any]:
    """Schemas that this one can expand to without consuming any text."""
    if "$ref" in schema:
        yield _target(schema["$ref"], root)
    for key in ("allOf", "anyOf", "oneOf"):
        yield from _of_type(schema, key, list)


def _target(reference: Any, root: Any) -> Any:
    """The target of a JSON pointer; None if there is none."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found = root
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema."""
    for key in _ONE:
        if key in schema:
            yield key, schema[key]
    for key in _LISTS:
        yield from ((f"{key}[{index}]", part) for index, part in enumerate(_of_type(schema, key, list)))
    for key in _MAPS:
        yield from ((f"{key}.{name}", part) for name, part in _of_type(schema, key, dict).items())


def _of_type(schema: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of ``key``, or an empty one if it is absent. Raises InvalidRequest if it has another type."""
    value = schema.get(key, kind())
    if not isinstance(value, kind):
        raise InvalidRequest(f"{key!r} in a schema must be {'a list' if kind is list else 'an object'}")
    return value
