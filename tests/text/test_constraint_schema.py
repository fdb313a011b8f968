"""A schema that cannot be enforced, or that could do harm, is refused by name before any compiler sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import GrammarError
from edgert.text.constraint_schema import (
    MAX_EXACT,
    MAX_MULTIPLE,
    MAX_NESTING,
    MAX_PROPERTIES,
    MAX_SCHEMA_BYTES,
    MAX_VALUES,
    schema_to_llguidance,
)


@pytest.mark.parametrize(("schema", "named"), [
    ({"uniqueItems": True}, "uniqueItems"),
    ({"not": {}}, "not"),
    ({"if": {}, "then": {}}, "if"),
    ({"type": "string", "minLenght": 3}, "minLenght"),
    ({"nullable": True}, "nullable"),
    ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ({"properties": {"a": {"items": [{"contains": {}}]}}}, "#/properties/a/items/0.*contains"),
    ({"anyOf": [{}, {"additionalProperties": {"propertyNames": {}}}]}, "#/anyOf/1/additionalProperties.*propertyNames"),
    ({"$defs": {"unused": {"allOf": [{"dependentRequired": {}}]}}}, "dependentRequired"),
    ({"$ref": "#/x-hidden/a", "x-hidden": {"a": {"unevaluatedItems": False}}}, "#/x-hidden/a.*unevaluatedItems"),
    ({"items": {"$id": "b"}}, r"\$id"),
    ({"$schema": "https://example.com/my-own"}, r"\$schema"),
    ({"$dynamicRef": "#a"}, "dynamicRef"),
])
def test_a_keyword_that_is_not_enforced_is_named(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(GrammarError, match=named) as caught:
        schema_to_llguidance(schema)
    assert caught.value.next_step
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(("schema", "problem"), [
    ({"$ref": "https://example.com/schema.json"}, "is not in this schema"),
    ({"$ref": "other.json#/a"}, "is not in this schema"),
    ({"$ref": "#anchor"}, "is not in this schema"),
    ({"$ref": 5}, "is not in this schema"),
    ({"$ref": "#/$defs/a"}, "there is no"),
    ({"$ref": "#/anyOf/2", "anyOf": [{}, {}]}, "there is no"),
    ({"$ref": "#/title", "title": "text"}, "is not a schema"),
    ({"format": "regex"}, '"regex" is not supported'),
    ({"format": {}}, "is not supported"),
    ({"properties": []}, "is not an object"),
    ({"anyOf": {}}, "is not a list"),
    ({"items": 5}, "is not a schema"),
    ({"minimum": "1"}, "is not a number"),
    ({"const": MAX_EXACT + 1}, "cannot be kept exactly"),
    ({"enum": [{"a": [1e300]}]}, "cannot be kept exactly"),
    ({"maximum": -1e-300}, "cannot be kept exactly"),
    ({"multipleOf": MAX_MULTIPLE + 1}, "is not possible"),
    ({"multipleOf": 0.99983}, "is not possible"),
    ({"multipleOf": 0}, "is not possible"),
    ({"multipleOf": -1}, "is not possible"),
    ({"minProperties": 2}, "different names"),
    ({"minProperties": 4, "required": ["a", "b"]}, "different names"),
    (False, "not a JSON object"),
    ("[]", "not a JSON object"),
    ("", "not JSON"),
    ('{"a": NaN}', "not JSON"),
    ('{"type": "string", "type": "number"}', '"type" twice'),
    ('{"const": 1e999}', "cannot be kept exactly"),
    ('{"const": ' + "9" * 5000 + "}", "not JSON"),
    ({"default": {1, 2}}, "cannot be written as JSON"),
])
def test_what_is_wrong_is_said(schema: Any, problem: str) -> None:
    with pytest.raises(GrammarError, match=problem) as caught:
        schema_to_llguidance(schema)
    assert caught.value.next_step
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("schema", [
    '{"title": "' + "x" * MAX_SCHEMA_BYTES + '"}',
    "[" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    '{"const": ' + "[" * MAX_NESTING + "]" * MAX_NESTING + "}",
    {"properties": {str(i): {} for i in range(MAX_PROPERTIES + 1)}},
    {"required": [str(i) for i in range(MAX_PROPERTIES + 1)]},
    {"enum": list(range(MAX_VALUES + 1))},
    {"anyOf": [{"const": [i, i]} for i in range(MAX_VALUES // 2)]},
])
def test_size_is_bounded_before_anything_recurses(schema: Any) -> None:
    with pytest.raises(GrammarError):
        schema_to_llguidance(schema)


def test_a_dict_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(GrammarError, match="cannot be written"):
        schema_to_llguidance(schema)


def test_brackets_in_strings_do_not_count_as_nesting() -> None:
    assert schema_to_llguidance(json.dumps({"const": '\\"' + "[{" * 500}))


@pytest.mark.parametrize("schema", [
    True, {}, {"minProperties": 1}, {"minProperties": 3, "required": ["a", "b"]}, {"multipleOf": 0.25}, {"const": -0.0},
    {"items": {"$ref": "#"}}, {"exclusiveMinimum": True, "minimum": 3}, {"$id": "https://example.com/a"},
    {"$ref": "#/$defs/a~1b~0%25", "$defs": {"a/b~%": {"type": "null"}}}, {"enum": [1e15, 1e-15, MAX_EXACT]},
])
def test_a_sound_schema_is_taken(schema: Any) -> None:
    assert schema_to_llguidance(schema) == schema_to_llguidance(json.dumps(schema))


KEYWORDS = st.sampled_from(["type", "items", "$ref", "properties", "anyOf", "enum", "const", "minimum", "required",
                            "multipleOf", "minProperties", "format", "$schema", "$defs", "not", "title"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["#", "#/a/0"]),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYWORDS | st.text(max_size=3), inner,
                                                                         max_size=3)), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_value_is_taken_or_refused_with_a_grammar_error(value: Any) -> None:
    try:
        schema_to_llguidance(value)
    except GrammarError as error:
        assert error.next_step
