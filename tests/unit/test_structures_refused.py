"""Structures that cannot be enforced, or would be slow to follow, are refused with a reason."""

import itertools
import json
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from deltazip_ray.engine.request_checks import MOST_STRUCTURE_CHARS
from deltazip_ray.engine.structure import Structures, grammars, structures
from deltazip_ray.engine.structure.grammars import Compiled, GrammarMatcher, Vocabulary, compile_structure
from deltazip_ray.engine.structure.json_schemas import check_schema
from deltazip_ray.engine.structure.regexes import check_regexes
from deltazip_ray.errors import InvalidRequest, RequestTimeout
from deltazip_ray.scheduler.request import Structure

INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + [b""], stop_token_ids=[256])
BYTES = Vocabulary.of(INFO)
SELF = {"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}]}
DEEP: dict[str, Any] = {"type": "null"}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}


def matches(structure: Structure, text: str) -> bool:
    """Whether ``text`` is a complete output."""
    matcher = xgrammar.GrammarMatcher(compile_structure(structure, BYTES).grammar)
    return bool(matcher.accept_string(text) and matcher.is_completed())


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "properties.a: 'not'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"allOf": [{"type": "integer"}, {"maximum": 3}]}, "allOf"),
        ({"minimum": 5, "anyOf": [{"type": "integer"}]}, "'minimum'.*beside 'anyOf'"),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {}}}, "beside '\\$ref'"),
        ({"$ref": "https://example.com/schema"}, "leads nowhere"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "leads nowhere"),
        ({"type": "object", "required": ["b"]}, "'b'"),
        ({"type": "string", "pattern": "a*", "minLength": 2}, "pattern"),
        ({"type": "string", "pattern": "((.?){0,1000}){0,1000}"}, "make more than 10000"),
        ({"patternProperties": {"((.?){0,1000}){0,1000}": {}}}, "make more than 10000"),
        ({"anyOf": [{"type": "string", "pattern": "a{90}"} for _ in range(200)]}, "make more than 10000"),
        ({"$ref": "#/$defs/s", "$defs": {"s": SELF}}, "refers to itself"),
        ({"$ref": "#"}, "refers to itself"),
        (DEEP, "32 deep"),
        ({"anyOf": [{"type": "string", "maxLength": i} for i in range(600)]}, "512"),
        ({"type": "array", "items": 5}, "items must be an object"),
        ({"properties": []}, "'properties'"),
    ],
)
def test_schemas_that_would_not_be_enforced(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_schema(json.dumps(schema))


@pytest.mark.parametrize("text", ["", "{", "5", "[" * 100_000, "NaN"])
def test_what_is_no_schema(text: str) -> None:
    with pytest.raises(InvalidRequest, match="schema"):
        check_schema(text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "object", "properties": {"not": {"type": "null"}}, "required": ["not"]}, {"not": None}, {}),
        ({"type": "integer", "multipleOf": 5}, 10, 11),
        (
            {"type": "object", "properties": {"of": {"$ref": "#"}, "n": {"type": "integer"}}},
            {"of": {"of": {"n": 1}}},
            {"of": 1},
        ),
        ({"type": "array", "items": {"enum": ["a", None, 3]}, "minItems": 1, "maxItems": 2}, ["a", None], []),
        ({"oneOf": [{"const": "x"}, {"type": "integer", "minimum": -3, "maximum": 12}], "title": "T"}, 12, 13),
        ({"type": "string", "pattern": "^[a-z]{2,3}$"}, "abc", "abcd"),
        ({"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}}, {"x1": True}, {"x1": 1}),
    ],
)
def test_schemas_that_are_enforced(schema: Any, good: Any, bad: Any) -> None:
    structure = Structure("json_schema", json.dumps(schema))
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(good)
    assert not validator.is_valid(bad)
    assert matches(structure, json.dumps(good))
    assert matches(structure, json.dumps(good, indent=2))
    assert not matches(structure, json.dumps(bad))


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (Structure("json"), '{"a": [1, {"b": null}]}', "[1]"),
        (Structure("regex", r"\d{3}-\d{4}"), "555-1234", "555-123"),
        (Structure("choice", json.dumps(['say "hi"', "a\\b", "two\nlines", "é€"])), 'say "hi"', "say"),
        (Structure("choice", json.dumps(["a\\b", "two\nlines"])), "two\nlines", "two"),
        (Structure("choice", json.dumps(["é€😀"])), "é€😀", "é€"),
        (Structure("grammar", 'root ::= "a" root "b" | "c"'), "aacbb", "aacb"),
    ],
)
def test_every_kind_of_structure(structure: Structure, good: str, bad: str) -> None:
    assert matches(structure, good)
    assert not matches(structure, bad)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure("regex", "(a"), "compiled: .*parenthesis"),
        (Structure("regex", "(?=x)"), "Lookahead"),
        (Structure("regex", "((a{0,100}b){0,100}){0,100}"), "make more than 10000"),
        (Structure("grammar", "root ::= "), "EBNF"),
        (Structure("grammar", "root ::= root"), "no text"),
        (Structure("json_schema", "false"), "any value"),
        (Structure("regex", "a" * (MOST_STRUCTURE_CHARS + 1)), "65536"),
    ],
)
def test_structures_that_cannot_be_compiled_say_why(structure: Structure, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        compile_structure(structure, BYTES)


def test_counts_that_are_not_nested_do_not_multiply() -> None:
    check_regexes(r"a{1,9000}(b{1,90}c){1,90}[{9999}{9999}]\{9999}(d*){5000}")
    with pytest.raises(InvalidRequest, match="make more than 10000"):
        check_regexes("x(a(b|c{120})|d){5,100}")


@pytest.mark.parametrize("regex", ["[" * MOST_STRUCTURE_CHARS, "a{" + "1" * (MOST_STRUCTURE_CHARS - 2)])
def test_checking_an_expression_takes_no_longer_than_reading_it(regex: str) -> None:
    """Nothing else can run in the replica meanwhile. With backtracking half of either took seconds."""
    began = time.perf_counter()
    check_regexes(regex)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "regex", ["[^]((a{99}){99}){99}]", "a{" + "1" * 5000 + "}", "a{00000000000011000}", "a{9}" + "{9}" * 5000]
)
def test_counts_are_read_as_the_compiler_reads_them(regex: str) -> None:
    with pytest.raises(InvalidRequest, match="lower the counts"):
        check_regexes(regex)


def test_no_surrogates_and_no_control_characters() -> None:
    """Which xgrammar alone would let through."""
    for kind in (Structure("json_schema", '{"type": "string", "maxLength": 9}'), Structure("regex", '".*"')):
        matcher = GrammarMatcher(compile_structure(kind, BYTES))

        def may_come(byte: int, matcher: GrammarMatcher = matcher) -> bool:
            return bool(int(matcher.allowed().view(np.uint32)[byte // 32]) >> byte % 32 & 1)

        matcher.accept(ord('"'))
        assert may_come(0x07) == (kind.kind == "regex")
        assert may_come(0xED)
        matcher.accept(0xED)
        assert may_come(0x9F)
        assert not may_come(0xA0)
        for byte in (0x95, 0x98, 0xEB):
            matcher.accept(byte)
        assert may_come(0xA0)


def test_nothing_comes_behind_the_end() -> None:
    matcher = GrammarMatcher(compile_structure(Structure("regex", "ab?"), BYTES))
    matcher.accept(ord("a"))
    assert matcher.allowed().any()
    matcher.accept(256)
    assert not matcher.allowed().any()


def test_a_structure_that_becomes_slow_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher, used_s = GrammarMatcher(compile_structure(Structure("regex", "a*"), BYTES)), itertools.count(step=0.1)
    monkeypatch.setattr(grammars.time, "thread_time", lambda: next(used_s))
    tokens = 0
    while matcher.allowed().any():
        matcher.accept(ord("a"))
        tokens += 1
    assert tokens == 6, "each takes 0.2 s; 1 s is there at first, and 5 ms come with each"


async def test_a_structure_is_compiled_once_for_all_versions_of_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Structure] = []

    def counted(structure: Structure, vocabulary: Vocabulary) -> Compiled:
        compiled.append(structure)
        return compile_structure(structure, vocabulary)

    async def vocabulary(version: str | None) -> Vocabulary:
        if version == "broken":
            raise InvalidRequest("no end token")
        return BYTES

    monkeypatch.setattr(structures, "compile_structure", counted)
    made = Structures(vocabulary)
    first, second = [await made.matcher(version, Structure("regex", "a+b")) for version in ("v", "w")]
    first.accept(ord("a"))
    assert first.allowed().tolist() != second.allowed().tolist()
    assert len(compiled) == 1
    with pytest.raises(InvalidRequest, match="end token"):
        await made.matcher("broken", Structure("json"))


async def test_a_slow_compilation_fails_its_request() -> None:
    async def vocabulary(_: str | None) -> Vocabulary:
        return BYTES

    with pytest.raises(RequestTimeout, match="simpler"):
        await Structures(vocabulary, timeout_s=0.0).matcher(None, Structure("json"))
