"""A JSON Schema before it is compiled: is it one, would compiling it end, is it read as meant?
It does not call the compiler.

llguidance bounds what it does but for two things. Several patterns of one string are intersected in
exponential time. A divisor (`multipleOf`) becomes an automaton of as many states.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

MAX_PATTERNS = 8
"""Patterns and formats that one string may have to match; llguidance gives up before."""

MAX_DIVISOR_STATES = 20_000
"""States of all automata for divisors, were each for the least common multiple of the divisors."""

BESIDE = ("properties", "patternProperties")
WITHIN = ("items", "additionalProperties", "prefixItems")


def parse_schema(text: str) -> dict[str, Any]:
    """The schema written in `text`. Raises ValueError where `check_schema` does, or it is none."""
    schema = parse_json(text)
    check_schema(schema)
    return schema


def parse_json(text: str) -> Any:
    """The value written in `text`, strictly. Raises ValueError where there is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {text!r:.100}: {error}") from error


def check_schema(schema: Any) -> None:
    """Raises ValueError where `schema` is no object, too much to compile, or would be misread."""
    if not isinstance(schema, dict):
        raise ValueError(f"expected a JSON Schema, an object, got {json.dumps(schema)[:100]}")
    try:
        objects = list(_objects(schema))
        _check_bounds(objects)
        _check_divisors(objects)
        _check_patterns(schema)
    except RecursionError as error:
        raise ValueError("the schema nests too deep; make it flatter") from error
    except OverflowError as error:
        raise ValueError("expected numbers that a float can hold, got a larger one") from error


def with_options(schema: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with options for llguidance's compiler; what the schema itself asks for stays."""
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise ValueError(f"x-guidance: expected an object, got {own!r:.100}")
    return {**schema, "x-guidance": {**options, **own}}


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in `value`: the schemas, and some that are none."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


def _numbers(schema: Mapping[str, Any], *keys: str) -> list[int | float]:
    values = (schema.get(key) for key in keys)
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _check_bounds(objects: Iterable[Mapping[str, Any]]) -> None:
    """llguidance allows a whole number that is excluded if the other bound is less than 1 away."""
    for schema in objects:
        for sign, exclusive, others in (
            (1, "exclusiveMinimum", ("maximum", "exclusiveMaximum")),
            (-1, "exclusiveMaximum", ("minimum", "exclusiveMinimum")),
        ):
            for bound in _numbers(schema, exclusive):
                gaps = [sign * (other - bound) for other in _numbers(schema, *others)]
                if bound % 1 == 0 and sign * bound >= 0 and any(0 < gap < 1 for gap in gaps):
                    raise ValueError(
                        f"{exclusive}: {bound} would not be kept, as the other bound is less than "
                        f"1 away; use {exclusive[9:].lower()} with a number next to it"
                    )


def _check_divisors(objects: Iterable[Mapping[str, Any]]) -> None:
    found = (n for schema in objects for n in _numbers(schema, "multipleOf") if n)
    divisors = [_significant_digits(n) for n in found]
    if len(divisors) * math.lcm(*divisors) > MAX_DIVISOR_STATES:
        raise ValueError(
            f"multipleOf: the {len(divisors)} divisors need more than {MAX_DIVISOR_STATES} states "
            "together; use smaller ones"
        )


def _significant_digits(divisor: int | float) -> int:
    """A power of ten costs no states."""
    return int("".join(map(str, Decimal(repr(divisor)).normalize().as_tuple().digits)))


def _check_patterns(schema: dict[str, Any]) -> None:
    num_patterns = _Patterns(schema).most(schema)
    if num_patterns > MAX_PATTERNS:
        raise ValueError(
            f"pattern, format: one string may have to match {num_patterns} of them, expected at "
            f"most {MAX_PATTERNS}; merge them"
        )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class _Patterns:
    """Counts how many patterns may meet in one string. It may count some that do not."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._counts: dict[str, int] = {}  # by reference

    def most(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return 0
        own = sum(key in schema for key in ("pattern", "format"))
        inner = max(map(self.most, _parts(schema)), default=0)
        alternatives = sum(
            max(map(self.most, _listed(schema.get(key))), default=0) for key in ("anyOf", "oneOf")
        )
        together = sum(map(self.most, _listed(schema.get("allOf"))))
        return max(own, inner) + alternatives + together + self._of_reference(schema.get("$ref"))

    def _of_reference(self, reference: Any) -> int:
        if not isinstance(reference, str):
            return 0
        if reference not in self._counts:
            self._counts[reference] = 0  # within itself it describes another string
            self._counts[reference] = self.most(self._target(reference))
        return self._counts[reference]

    def _target(self, reference: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"$ref: expected #/..., a path within the schema, got {reference!r}")
        target: Any = self._root
        for key in unquote(reference).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key) if isinstance(target, list) else key]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"$ref: {reference!r} is not in the schema") from None
        return target


def _parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Schemas of what an object or array holds."""
    for key in BESIDE:
        if isinstance(parts := schema.get(key), dict):
            yield from parts.values()
    for key in WITHIN:
        yield from _listed(schema.get(key))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
