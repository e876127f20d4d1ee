from __future__ import annotations

import json
from typing import Any

import pytest

from piclusterd.errors import UserError
from piclusterd.inference.grammar import compile_schema
from piclusterd.inference.schema import check_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: dict[str, Any] = {
    "many items": {"type": "array", "items": {}, "maxItems": 1_000_000},
    "long string": {"type": "string", "maxLength": 1_000_000},
    "long minimum": {"type": "string", "minLength": 1_000_000, "maxLength": 1_000_001},
    "negative": {"type": "string", "maxLength": -1},
    "not a number": {"type": "string", "maxLength": "9"},
    "deep": nested(300),
    "just too deep": nested(16),
    "wide": {"type": "object", "properties": {f"p{n}": {} for n in range(65)}},
    "repeating pattern": {"type": "string", "pattern": "^a{1000000}$"},
    "large": {"enum": ["x" * 17_000]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_schema_bombs_are_refused_before_they_become_grammars(name: str) -> None:
    with pytest.raises(UserError, match="refused"):
        check_schema(json.dumps(BOMBS[name]))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, "null"])
def test_what_is_not_a_schema_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="refused"):
        check_schema(text)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/nowhere"},
        {"type": "unheard of"},
        {"type": "array", "items": {"type": "string", "maxLength": 1024}, "maxItems": 1024} | {"minItems": "x"},
    ],
)
def test_what_cannot_be_expressed_is_refused_and_nothing_is_fetched(schema: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="refused"):
        compile_schema(json.dumps(schema))


def test_properties_named_like_keywords_are_properties() -> None:
    check_schema(json.dumps({"type": "object", "properties": {"maxLength": {"type": "integer"}}}))


def test_constants_keep_their_quotes_and_backslashes() -> None:
    grammar = compile_schema(json.dumps({"enum": ['a"b\\c', "é\n"]})).decode()
    assert r'"\"a\\\"b\\\\c\""' in grammar
    assert r'"\"é\\n\""' in grammar


def test_strings_may_not_hold_raw_control_characters() -> None:
    for schema in ('{"type": "string", "maxLength": 3}', '{"type": "object"}', '{"type": "string"}'):
        grammar = compile_schema(schema)
        assert rb"char ::= [\x20-\x21\x23-\x5B\x5D-\x7E" in grammar
