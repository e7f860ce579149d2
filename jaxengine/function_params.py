"""The numbers of registered functions: their defaults, what a request gives, and the words of 32
bits in which they travel to the device."""

from reprlib import repr as short
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jaxengine.sampling.extensions import Function


def defaults_of(name: str, each: Function) -> dict[str, np.ndarray]:
    """The parameters as arrays of 32 bits, or of truth values."""
    found = {}
    for param, given in each.params.items():
        value = np.asarray(given)
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{name}: params[{param!r}]: expected numbers, got {given!r}")
        found[param] = value.astype(KINDS[value.dtype.kind])
    return found


KINDS = {"b": np.bool_, "i": np.int32, "u": np.uint32, "f": np.float32}
ACCEPTED = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # kinds of number that will do


def value_of(param: str, given: Any, default: np.ndarray) -> np.ndarray:
    """What a request gives for a parameter, as the default's kind of number.

    Raises:
        ValueError: it has another shape, or is no such number.
    """
    value = np.asarray(given)
    if value.shape != default.shape or value.dtype.kind not in ACCEPTED[default.dtype.kind]:
        expected = f"{default.dtype} of shape {default.shape}"
        raise ValueError(f"custom_params: {param}: expected {expected}, got {short(given)}")
    return value.astype(default.dtype)


def as_words(value: np.ndarray) -> np.ndarray:
    return value.astype(np.int32) if value.dtype == np.bool_ else value.view(np.int32)


def from_words(words: Int32[Array, "I n"], dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    values = words != 0 if dtype == np.bool_ else lax.bitcast_convert_type(words, dtype)
    return values.reshape(len(words), *shape)
