"""A kernel at one size: arguments, what computes with them, and the least that it takes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.bench.floors import Work

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed, and against what."""

    kernel: str
    shape: str
    make: Callable[[jax.Array], tuple[Any, ...]]  # random arguments from a key
    variants: Mapping[str, Callable[..., Any]]  # of the same arguments; the kernel first
    work: Work
    in_place: int | None = None  # argument that is overwritten; a call returns it and the rest


def sizes(shape: Any) -> dict[str, Any]:
    """The fields of an entry of `SHAPES`, which may be a dictionary or a class."""
    if isinstance(shape, Mapping):
        return dict(shape)
    return asdict(shape) if is_dataclass(shape) else shape._asdict()  # type: ignore[arg-type]
