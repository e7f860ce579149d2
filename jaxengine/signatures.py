"""A method and its twin for coroutines have one signature, written once."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def takes(
    like: Callable[Parameters, Any],
) -> Callable[[Callable[..., Result]], Callable[Parameters, Result]]:
    """Decorates a function that hands on its arguments as they are: for `help`, editors and type
    checkers they are those of `like`."""

    def decorate(function: Callable[..., Result]) -> Callable[Parameters, Result]:
        function.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
        return function

    return decorate
