"""New values for parameters: what a caller gives, checked against what a model has, and the
compiled copies that put it there. It knows names, shapes and arrays, and no engine.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.models.interface import Piece
from jaxengine.weights import cast, dotted, listed, merges_to, shape_of

FLOATS = ("bfloat16", "float16", "float32", "float64")


class Part(NamedTuple):
    """What has a name: a parameter, or what one checkpoint tensor fills of it."""

    parameter: int  # among the leaves of the parameters' tree
    index: Any  # the part is `parameter[index]`
    shape: tuple[int, ...]  # of that
    tensor_shape: tuple[int, ...]  # of the checkpoint tensor, or of the parameter
    dtype: np.dtype
    tensors: tuple[str, ...]  # names of the checkpoint tensors that it holds


class Change(NamedTuple):
    """Values that fit a part."""

    part: Part
    values: jax.Array | np.ndarray


def named_parts(
    params: nnx.State[Any, Any], pieces: Mapping[str, Sequence[Piece]], base_prefix: str = ""
) -> dict[str, Part]:
    """All parts of a tree of parameters, by the dotted path of each parameter and by the name of
    each checkpoint tensor, with and without `base_prefix`."""
    parts: dict[str, Part] = {}
    for number, (path, param) in enumerate(nnx.to_flat_state(params)):
        own, dtype = pieces[dotted(path)], np.dtype(param.dtype)
        names = tuple(piece.name for piece in own)
        parts[dotted(path)] = Part(number, ..., param.shape, param.shape, dtype, names)
        for name, index in own:
            shape = shape_of(param.shape, index)
            as_stored = _tensor_shape(shape, param.axes)
            part = Part(number, index, shape, as_stored, dtype, (name,))
            parts |= dict.fromkeys((name, name.removeprefix(base_prefix)), part)
    return parts


def named_arrays(weights: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of an nnx model, of its state, or of dictionaries of any depth, each with its
    dotted path."""
    tree = nnx.state(weights) if isinstance(weights, nnx.Module) else weights
    if not isinstance(tree, Mapping):
        raise ValueError(
            "weights: expected an nnx model, its state, or a dictionary of arrays by name, got "
            f"{type(weights).__name__}"
        )
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", leaf) for name, leaf in named_arrays(value))
        else:
            yield str(key), value


def changes(
    named: Iterable[tuple[str, Any]],
    parts: Mapping[str, Part],
    *,
    is_ignorable: Callable[[str], bool] = lambda name: False,
) -> list[Change]:
    """What arrays of these names change. Those on a device stay there; host arrays are cast here.

    Raises:
        ValueError: an unknown name, a shape that does not fit, a dtype that is no float of at least
            16 bits, a value given twice, an array that was deleted; or nothing at all.
    """
    found = [
        Change(*_fitting(name, value, parts))
        for name, value in named
        if name in parts or not is_ignorable(name)
    ]
    if not found:
        raise ValueError("weights: expected at least one array, got none")
    twice = [name for name, count in Counter(tensors_of(found)).items() if count > 1]
    if twice:
        raise ValueError(f"given twice: {listed(twice)}; give each tensor or its parameter once")
    return found


def tensors_of(found: Iterable[Change]) -> list[str]:
    """Names of the checkpoint tensors that get new values."""
    return [name for change in found for name in change.part.tensors]


class Copies:
    """Compiled copies of new values into parameters, each of which takes the old array's memory."""

    def __init__(self, params: Sequence[jax.ShapeDtypeStruct]):
        self._params = params
        self._compiled: dict[Any, Any] = {}

    def of(self, change: Change) -> Callable[[jax.Array], jax.Array]:
        """A function of the old parameter, whose array it donates. The values may be anywhere; they
        are only read."""
        old, (part, values) = self._params[change.part.parameter], change
        new = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=old.sharding)
        key = old.shape, old.dtype, repr(part.index), new.shape, new.dtype
        if key not in self._compiled:
            copy = jax.jit(
                partial(_copied, part=part),
                donate_argnums=0,
                keep_unused=True,  # the old values are not used, their memory is
            )
            self._compiled[key] = copy.lower(old, new).compile()
        copy = self._compiled[key]
        return lambda array: copy(array, jax.device_put(values, old.sharding))


def first_rows(param: jax.Array, part: Part, count: int) -> np.ndarray:
    """The first rows of a part, in the shape of its checkpoint tensor."""
    rows = jax.jit(lambda param: param[part.index].reshape(part.tensor_shape)[:count])
    return np.asarray(rows(param))


def _copied(
    old: Float[Array, "..."], new: Float[Array, "..."], *, part: Part
) -> Float[Array, "..."]:
    return old.at[part.index].set(new.reshape(part.shape).astype(old.dtype))


def _fitting(name: str, value: Any, parts: Mapping[str, Part]) -> tuple[Part, Any]:
    if name not in parts:
        close = difflib.get_close_matches(name, parts, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: this model has no parameter or tensor of that name{hint}")
    part, values = parts[name], _array(name, value)
    if values.dtype.name not in FLOATS:
        raise ValueError(
            f"{name}: expected {', '.join(FLOATS)}, got {values.dtype}; quantized weights are not "
            "supported"
        )
    if not merges_to(part.shape, values.shape):
        raise ValueError(f"{name}: expected the shape {part.tensor_shape}, got {values.shape}")
    return part, cast(values, part.dtype, name) if isinstance(values, np.ndarray) else values


def _array(name: str, value: Any) -> jax.Array | np.ndarray:
    """A value as an array, without a copy."""
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"{name}: the array was deleted or donated; give it before that")
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if not hasattr(value, "__dlpack__"):
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}")
    if hasattr(value, "detach"):  # PyTorch's: they are not given away while they need gradients
        value = value.detach().contiguous()
    return jnp.from_dlpack(value)


def _tensor_shape(shape: tuple[int, ...], axes: Sequence[str]) -> tuple[int, ...]:
    """The shape in a checkpoint, where a matrix has the model's width on one side and all the rest
    on the other, and what has no such side is flat."""
    if "embed" not in axes or len(shape) == 1:
        return (math.prod(shape),)
    if axes[-1] == "embed":
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])
