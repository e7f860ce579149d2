"""Which schemas are passed on, and which are refused before a compiler would choke on them."""

import json
from typing import Any

import llguidance
import pytest

from jaxengine.json_schemas import MAX_PATTERNS, parse_schema, with_options


def _patterns(count: int) -> list[dict[str, str]]:
    return [{"pattern": f"a{{{i},}}"} for i in range(count)]


MOST = {"type": "string", "allOf": _patterns(MAX_PATTERNS)}
HALF = {"allOf": _patterns(MAX_PATTERNS // 2 + 1)}
PERSON = {
    "properties": {
        "name": {"pattern": "^[A-Z]"},
        "born": {"format": "date"},
        "friends": {"items": {"$ref": "#/$defs/person"}},
        "next": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
    }
}
RECURSIVE = {
    "$defs": {"person": PERSON, "base": {"properties": {"id": {"format": "uuid"}}}},
    "allOf": [{"$ref": "#/$defs/base"}, {"$ref": "#/$defs/person"}],
}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        MOST,
        RECURSIVE,
        {"properties": {f"p{i}": {"pattern": "^a", "format": "date"} for i in range(100)}},
        {"anyOf": [HALF, HALF, HALF]},
        {"properties": {"a": HALF}, "items": HALF},
        {"$ref": "#/definitions/a~1b%25", "definitions": {"a/b%": HALF}},
        {"items": {"$ref": "#/prefixItems/1"}, "prefixItems": [{}, HALF]},
        {"items": {"properties": {"multipleOf": {"multipleOf": 1000}, "b": {"multipleOf": 7}}}},
        {"properties": {f"p{i}": {"multipleOf": 0.01} for i in range(1000)}},
        {"multipleOf": 10**30, "enum": [{"multipleOf": "x"}, {"multipleOf": True}, 0.1]},
    ],
)
def test_what_real_schemas_do_is_accepted_and_kept(schema: dict[str, Any]) -> None:
    parsed = parse_schema(json.dumps(schema))
    assert parsed == schema and list(parsed) == list(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [MOST, {"format": "date"}]},
        {"allOf": [HALF, HALF]},
        {"anyOf": [HALF, {}], "$ref": "#/$defs/a", "$defs": {"a": HALF}},
        {"pattern": "a", "allOf": [{"oneOf": [{}, HALF]}, {"anyOf": [HALF]}]},
        {"allOf": [{"properties": {"a": HALF}}, {"properties": {"a": HALF}}]},
        {"allOf": [{"items": HALF}, {"prefixItems": [{}, HALF]}]},
        {"properties": {"a": {"additionalProperties": {"allOf": [HALF, HALF]}}}},
        {"patternProperties": {"^a": {"allOf": [HALF, HALF]}}},
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"pattern": "a", "$ref": f"#/$defs/{i + 1}"} for i in range(20)}
            | {"20": {}},
        },
    ],
)
def test_many_patterns_of_one_string_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^pattern, format: one string may have to match"):
        parse_schema(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 62615533},
        {"multipleOf": 0.123456},
        {"allOf": [{"multipleOf": n} for n in (97, 101, 103)]},
        {"prefixItems": [{"multipleOf": 1009} for _ in range(20)]},
    ],
)
def test_divisors_of_too_many_states_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^multipleOf: the .* divisors need more than"):
        parse_schema(json.dumps(schema))


@pytest.mark.parametrize(
    ("exclusive", "bound", "other", "value", "is_refused"),
    [
        ("exclusiveMinimum", 0, "maximum", 0.125, True),
        ("exclusiveMinimum", 1.0, "exclusiveMaximum", 1.5, True),
        ("exclusiveMaximum", 0, "minimum", -0.5, True),
        ("exclusiveMaximum", -2, "exclusiveMinimum", -2.01, True),
        ("exclusiveMinimum", 0, "maximum", 1, False),
        ("exclusiveMinimum", -1, "maximum", -0.5, False),
        ("exclusiveMinimum", 0.5, "maximum", 0.75, False),
        ("exclusiveMaximum", 1, "minimum", 0.5, False),
    ],
)
def test_bounds_that_would_be_misread_are_refused(
    exclusive: str, bound: float, other: str, value: float, is_refused: bool
) -> None:
    schema = {"type": "number", exclusive: bound, other: value}
    compiled = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), compiled, log_level=0)
    text = "-0" if bound == 0 and exclusive == "exclusiveMaximum" else f"{bound:.0f}"
    tokens = list(text.encode())
    is_misread = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
    assert is_misread == is_refused, "llguidance has changed: see whether the check is needed"
    if is_refused:
        with pytest.raises(ValueError, match=f"^{exclusive}: {bound} would not be kept"):
            parse_schema(json.dumps({"items": schema}))
    else:
        parse_schema(json.dumps({"items": schema}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got '{': "),
        ('{"minimum": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "expected JSON, got .* recursion"),
        ("true", "expected a JSON Schema, an object, got true"),
        ('"a"', 'expected a JSON Schema, an object, got "a"'),
        (f'{{"maximum": 0.5, "exclusiveMinimum": -{"9" * 400}}}', "numbers that a float can hold"),
        ('{"$ref": "http://example.com/a"}', "expected #/..., a path within the schema"),
        ('{"$ref": "#/$defs/a", "$defs": {}}', "'#/[$]defs/a' is not in the schema"),
        ('{"$ref": "#/items/x", "items": [{}]}', "is not in the schema"),
        (
            json.dumps({str(i): {"$ref": f"#/{i + 1}"} for i in range(9999)} | {"$ref": "#/0"}),
            "deep",
        ),
    ],
)
def test_what_is_no_schema_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schema(text)


def test_options_of_the_schema_itself_go_first() -> None:
    schema = {"type": "null", "x-guidance": {"whitespace_flexible": True}}
    options = with_options(schema, {"whitespace_flexible": False, "lenient": False})
    assert options["x-guidance"] == {"whitespace_flexible": True, "lenient": False}
    assert schema["x-guidance"] == {"whitespace_flexible": True}
    with pytest.raises(ValueError, match="x-guidance: expected an object, got 3"):
        with_options({"x-guidance": 3}, {})
