"""Values of single sampling parameters: what each kind may be, and how it is kept. It knows nothing
of the others."""

import json
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

MAX_STOP_STRINGS = 32
MAX_STOP_REGEXES = 32
MAX_STOP_REGEX_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_FUNCTIONS = 64
MAX_LOGIT_BIAS = 1024
"""Entries of `logit_bias`: every running request has room for so many on the device."""

MAX_GRAMMAR_BYTES = {
    "json_schema": 256 << 10,
    "regex": 32 << 10,
    "ebnf": 32 << 10,
    "structural_tag": 256 << 10,
}
"""Bytes of a field that constrains the completion. Compiling an expression can take time and memory
that grow with the square of its length, at worst 3 s and 1 GB here. Schemas are simpler."""


def is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_finite(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def strings(name: str, value: Any, limit: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{name}: expected a string or a list of strings, got {value!r}")
    if len(listed) > limit:
        raise ValueError(f"{name}: expected at most {limit} strings, got {len(listed)}")
    for string in listed:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name}: expected non-empty strings, got {string!r}")
    return tuple(listed)


def check_regex(pattern: str) -> None:
    size = len(pattern.encode(errors="surrogatepass"))
    if size > MAX_STOP_REGEX_BYTES:
        raise ValueError(
            f"stop_regex: expected at most {MAX_STOP_REGEX_BYTES} bytes a pattern, got {size}"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"stop_regex: expected a Python regular expression, got {pattern!r}: {error}"
        ) from error


def stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"stop_token_ids: expected a list of token ids, got {value!r}")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"stop_token_ids: expected at most {MAX_STOP_TOKEN_IDS} ids, got {len(value)}"
        )
    for token in value:
        if not is_integer(token) or token < 0:
            raise ValueError(f"stop_token_ids: expected integers >= 0, got {token!r}")
    return tuple(int(token) for token in value)


def biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias: expected a dict of token id to bias, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(
            f"logit_bias: expected at most {MAX_LOGIT_BIAS} entries, got {len(value)}; "
            "bias fewer tokens"
        )
    found: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if _is_token_key(key) else -1
        if token < 0:
            raise ValueError(f"logit_bias: expected token ids >= 0 as keys, got {key!r}")
        if token in found:
            raise ValueError(f"logit_bias: expected each token id once, got {key!r} again")
        if not is_finite(bias):
            raise ValueError(f"logit_bias: expected finite numbers, got {bias!r} for {key!r}")
        found[token] = float(bias)
    return found


def _is_token_key(key: Any) -> bool:
    """JSON has string keys only, so decimal digits count as the integer they write."""
    is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19
    return is_digits or is_integer(key)


def grammar(name: str, value: Any) -> str | None:
    """The text of a field that constrains the completion; a dict is written as JSON."""
    if value is None or value == "":
        return None
    if isinstance(value, Mapping) and name in ("json_schema", "structural_tag"):
        value = _json_text(name, value)
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text, got a string with half a surrogate pair: {error}"
        ) from error
    if size > MAX_GRAMMAR_BYTES[name]:
        raise ValueError(
            f"{name}: expected at most {MAX_GRAMMAR_BYTES[name]} bytes, got {size}; shorten it"
        )
    return value


def _json_text(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected what JSON can write, got {value!r}: {error}") from error
