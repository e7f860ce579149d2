"""What the consumers of Mosaic kernels compute with, on tensor cores or on a CPU.

An attention product ends the turn at the tensor cores (`then`) when all of it has been issued, and
returns when it is done. JAX's interpreters know neither products from registers nor layouts, so
that tests on a CPU have products of their own; all else is the same kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

LAYOUT = plgpu.Layout.WGMMA
COLUMNS = 8  # of a layout's smallest part
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


class Products(NamedTuple):
    """Of one warpgroup; q, k and v are in shared memory, all else is in registers."""

    scores: Callable[..., jax.Array]  # (q, k, then) -> q k'
    values_and_scores: Callable[..., tuple[jax.Array, jax.Array]]
    """(numerator, p, v, q, k, then) -> numerator + p v, q k'"""
    values: Callable[..., jax.Array]  # (numerator, p, v, then) -> numerator + p v
    add: Callable[..., jax.Array]  # (sums, x, weight) -> sums + x weight', x also in registers
    mask: Callable[..., jax.Array]
    """(scores, ahead, window, masked) -> scores, or `masked` where the query of a row, which is
    `ahead` of the first key for row 0, does not see the key of a column"""
    cast: Callable[..., jax.Array]  # to a layout
    iota: Callable[..., jax.Array]  # (shape, axis)


def over(each: jax.Array, like: jax.Array) -> jax.Array:
    """One value a query, for all columns."""
    return lax.broadcast_in_dim(each, like.shape, [0])


def _scores(q: Any, k: Any, then: Callable[[], None]) -> jax.Array:
    def multiply(scores: Any) -> jax.Array:
        plgpu.wgmma(scores, q, k.T)
        then()
        return scores[...]

    return pl.run_scoped(multiply, ACC((q.shape[0], k.shape[0]), jnp.float32))


def _values_and_scores(
    numerator: jax.Array, p: jax.Array, v: Any, q: Any, k: Any, then: Callable[[], None]
) -> tuple[jax.Array, jax.Array]:
    def multiply(refs: Any) -> None:
        plgpu.wgmma(refs[0], p, v)
        plgpu.wgmma(refs[1], q, k.T)
        then()

    scores = plgpu.layout_cast(jnp.zeros(p.shape, jnp.float32), LAYOUT)
    sums: Any = pl.run_state(multiply)((ACC.init(numerator), ACC.init(scores)))
    return sums


def _values(numerator: jax.Array, p: jax.Array, v: Any, then: Callable[[], None]) -> jax.Array:
    def multiply(out: Any) -> None:
        plgpu.wgmma(out, p, v)
        then()

    sums: Any = pl.run_state(multiply)(ACC.init(numerator))
    return sums


def _add(sums: jax.Array, x: Any, weight: Any) -> jax.Array:
    result: Any = pl.run_state(lambda out: plgpu.wgmma(out, x, weight.T))(ACC.init(sums))
    return result


def _mask(scores: jax.Array, ahead: jax.Array, window: int | None, masked: float) -> jax.Array:
    """As `Products.mask`, some columns at a time: their number is part of an instruction then.

    With a number for each column, the compiler would keep those in memory, which is slow to reach.
    """
    num_rows, num_columns = scores.shape

    def emit(_: Any, scores: Any, ahead: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        shape, layout = (num_rows, COLUMNS), scores.layout
        row, column = (
            mgpu.FragmentedArray.broadcasted_iota(i32, shape, axis, layout, is_signed=True)
            for axis in (0, 1)
        )
        behind = column - row - ahead
        nothing = mgpu.FragmentedArray.splat(mgpu.c(masked, scores.mlir_dtype), shape, layout)
        result = scores.copy()
        for first in range(0, num_columns, COLUMNS):
            columns = slice(first, first + COLUMNS)
            visible = behind <= -first
            if window is not None:
                visible = visible & (behind > -first - window)
            result[:, columns] = visible.select(scores[:, columns], nothing)
        return result

    inline: Any = plgpu.inline_mgpu(
        arg_types=(LAYOUT, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(scores.shape, scores.dtype, LAYOUT),
    )
    return inline(emit)(scores, ahead)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _interpreted_mask(
    scores: jax.Array, ahead: jax.Array, window: int | None, masked: float
) -> jax.Array:
    row, column = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    visible = column <= row + ahead
    if window is not None:
        visible &= column > row + ahead - window
    return jnp.where(visible, scores, masked)


def _interpreted(result: Any, then: Callable[[], None]) -> Any:
    then()
    return result


TENSOR_CORES = Products(
    _scores,
    _values_and_scores,
    _values,
    _add,
    _mask,
    plgpu.layout_cast,
    lambda shape, axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT),
)
INTERPRETED = Products(  # interpreters know neither products from registers nor layouts
    lambda q, k, then: _interpreted(_dot(q[...], k[...].T), then),
    lambda out, p, v, q, k, then: _interpreted(
        (out + _dot(p, v[...]), _dot(q[...], k[...].T)), then
    ),
    lambda out, p, v, then: _interpreted(out + _dot(p, v[...]), then),
    lambda sums, x, weight: sums + _dot(x[...], weight[...].T),
    _interpreted_mask,
    lambda array, layout: array,
    lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis),
)
