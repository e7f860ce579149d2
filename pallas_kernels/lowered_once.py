"""Kernels that are lowered once, however many programs call them.

Tracing and lowering a kernel takes Python far longer than all that stands around it, and the
programs of an engine have most of their kernels in common. JAX keeps what it traced and lowered of
a program that is the kernel alone. There a kernel has become one custom call, which holds all of it
in its attributes; other programs make the same call by JAX's foreign function interface.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

LONGEST = 2**30  # for Mosaic: longer than any array, and the copy engine takes 2**32


def lowered_once(
    make: Callable[..., Callable[..., Any]],
    *static: Hashable,
    results: tuple[jax.ShapeDtypeStruct, ...],
    length: int = 0,
    in_place: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Callable[..., tuple[jax.Array, ...]]:
    """The call of arrays that `make(*static, results, interpret)` returns, a kernel for an NVIDIA
    GPU. `make` is a function of a module, the same one every time.

    It is lowered when it is first called with arrays of such shapes. First axes shorter than
    `length` count as so long: where an element is does not depend on them. Such a kernel must stay
    within its arrays by itself, and ask none how long it is; the grid of one in Triton runs over
    the first axis of the first result. `in_place` maps arguments to the results that take their
    memory, for Mosaic, whose kernels cannot say so. An interpreted kernel is traced in its place,
    and shares no memory.
    """
    if interpret:
        return make(*static, results, True)

    def call(*arrays: Any) -> tuple[jax.Array, ...]:
        operation = _lowered(make, static, _stretched(results, length), _stretched(arrays, length))
        kernel = jax.ffi.ffi_call(
            operation.attributes["call_target_name"].value,
            results,
            input_output_aliases=_aliases(operation) | dict(in_place or {}),
        )
        attributes = _attributes(operation)
        if length and "grid_x" in attributes:
            attributes["grid_x"] = np.int32(results[0].shape[0])
        return tuple(kernel(*arrays, **attributes))

    return call


def _stretched(arrays: Sequence[Any], length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(
        jax.ShapeDtypeStruct((max(array.shape[0], length), *array.shape[1:]), array.dtype)
        for array in arrays
    )


def _lowered(
    make: Callable[..., Callable[..., Any]],
    static: tuple[Hashable, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """The custom call of a program that does nothing else."""
    traced = _jitted(make, static, results).trace(*shapes)
    module: Any = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    main = module.body.operations[0]
    call, *others, end = main.regions[0].blocks[0].operations
    arguments, returned = list(main.arguments), list(end.operands)
    if others or list(call.operands) != arguments or list(call.results) != returned:
        raise ValueError(f"{make.__name__}: expected a kernel alone, one custom call of all arrays")
    return call


@cache
def _jitted(
    make: Callable[..., Callable[..., Any]],
    static: tuple[Hashable, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """The same function for equal arguments: JAX's caches go by its identity."""
    return jax.jit(make(*static, results, False), keep_unused=True)


def _aliases(call: Any) -> dict[int, int]:
    """Operand -> the result in the same memory."""
    aliases = map(stablehlo.OutputOperandAlias, call.attributes["output_operand_aliases"])
    return {alias.operand_index: (*alias.output_tuple_indices, 0)[0] for alias in aliases}


def _attributes(call: Any) -> dict[str, Any]:
    attributes = call.attributes["mhlo.backend_config"]
    return {attribute.name: _value(attribute.attr) for attribute in attributes}


def _value(attribute: Any) -> Any:
    """What JAX makes the same attribute of."""
    match attribute:
        case ir.StringAttr():
            return attribute.value_bytes
        case ir.BoolAttr():
            return attribute.value
        case ir.IntegerAttr():
            return np.dtype(f"int{ir.IntegerType(attribute.type).width}").type(attribute.value)
    raise TypeError(f"an attribute of a kernel's call: expected text or a number, got {attribute}")
