"""Dataclass fields that carry their own help and rules, and what follows from those: conversion,
validation, command-line options. It does not know which arguments exist."""

import argparse
import dataclasses
import json
import math
import numbers
import os
import types
import typing
from typing import Any


def argument(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    otherwise: str | None = None,
    low: float | None = None,
) -> Any:
    """A field; `otherwise` says why there are no other choices, `low` is the least value."""
    rules = {"help": help, "choices": choices, "otherwise": otherwise, "low": low}
    return dataclasses.field(default=default, metadata=rules)


def kind_of(hint: Any) -> type:
    """The type in `type` or `type | None`; `tuple[int, ...]` counts as `tuple`."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (part,) = (part for part in parts if part is not types.NoneType)
    return typing.get_origin(part) or part


def converted(kind: type, value: Any) -> Any:
    """`value` as `kind` where it is a convenient form of it, else `value` itself."""
    if kind is str and isinstance(value, dict):
        return json.dumps(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        return float(value)
    return value


def check(field: dataclasses.Field[Any], kind: type, value: Any) -> None:
    """Raises: ValueError if `value` breaks a rule of the field."""
    if value is None and field.default is None:
        return
    if type(value) is not kind:
        raise ValueError(f"{field.name}: expected {kind.__name__}, got {value!r}")
    choices = field.metadata["choices"]
    if choices is not None and value not in choices:
        expected, reason = " or ".join(choices), field.metadata["otherwise"]
        raise ValueError(f"{field.name}: expected {expected}, got {value!r}; {reason}")
    if isinstance(value, tuple):
        if not value:
            raise ValueError(f"{field.name}: expected one or more whole numbers, got none")
        for number in value:
            _check_number(field, int, number)
    if kind in (int, float):
        _check_number(field, kind, value)


def _check_number(field: dataclasses.Field[Any], kind: type, number: Any) -> None:
    if type(number) is not kind:
        raise ValueError(f"{field.name}: expected {kind.__name__}, got {number!r}")
    if kind is float and not math.isfinite(number):
        raise ValueError(f"{field.name}: expected a finite number, got {number!r}")
    low = field.metadata["low"]
    if low is not None and number < low:
        raise ValueError(f"{field.name}: expected at least {low}, got {number!r}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The object written in `text`. Raises: ValueError if it is anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {text!r}")
    return value


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_settings(field: dataclasses.Field[Any], kind: type) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for the field."""
    choices = field.metadata["choices"]
    listed = f" ({', '.join(choices)})" if choices else ""
    settings = {"dest": field.name, "default": field.default}
    settings["help"] = field.metadata["help"] + listed
    if kind is bool:
        return settings | {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        return settings | {"type": int, "nargs": "+", "metavar": "N"}
    return settings | {"type": kind, "metavar": "X" if kind is str else "N"}
