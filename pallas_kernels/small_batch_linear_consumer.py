"""A consumer of `small_batch_linear`'s kernel: one of the one or two warpgroups of a block that
multiply, each the slices of its own turns. The first adds up and writes the outputs."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_extend_products import (
    INTERPRETED,
    LAYOUT,
    TENSOR_CORES,
    over,
)
from jaxengine.pallas_kernels.small_batch_linear_producer import FEW_ROWS, ROWS, Block


class Sums(NamedTuple):
    """Of all rows, over the slices so far."""

    products: jax.Array  # [ROWS, M tile_F]
    squares: jax.Array  # [ROWS], of the rows themselves


def consume(block: Block, consumer: jax.Array) -> None:
    memory, consumers = block.memory, block.config.consumers
    num_own = lax.div(block.num_slices - consumer + consumers - 1, consumers)
    add = partial(_add_slice, block)
    sums = lax.fori_loop(
        jnp.int32(0), num_own, lambda i, sums: add(i * consumers + consumer, sums), _nothing(block)
    )
    if consumers == 2:

        @pl.when(consumer == 1)
        def _() -> None:
            memory.sums[...] = sums.products
            memory.squares[...] = sums.squares
            plgpu.barrier_arrive(memory.joined.at[0])

    pl.when(consumer == 0)(lambda: _finish(block, sums))


def _nothing(block: Block) -> Sums:
    cast = _products(block).cast
    width = block.shape.M * block.config.tile_F
    zeros = cast(jnp.zeros((ROWS, width), jnp.float32), LAYOUT)
    return Sums(zeros, cast(jnp.zeros(ROWS, jnp.float32), LAYOUT.reduce(1)))


def _add_slice(block: Block, index: Any, sums: Sums) -> Sums:
    memory, products, slot = block.memory, _products(block), block.slot(index)
    plgpu.barrier_wait(memory.full.at[slot])
    x, weight, squares = _rows(block, slot), memory.weight_tiles.at[slot], sums.squares
    if memory.scale is not None:
        wide = products.cast(x[...], LAYOUT).astype(jnp.float32)
        scale = products.cast(memory.scale_tiles[slot], LAYOUT.reduce(0)).astype(jnp.float32)
        squares = squares + (wide * wide).sum(axis=1)
        x = (wide * lax.broadcast_in_dim(scale, wide.shape, [1])).astype(x.dtype)
    summed = products.add(sums.products, x, weight)
    plgpu.barrier_arrive(memory.free.at[slot])
    return Sums(summed, squares)


def _rows(block: Block, slot: Any) -> Any:
    """Of a slice, [ROWS tile_D]: in shared memory, or of few rows in registers, again and again."""
    x, B, products = block.memory.x_tiles.at[slot], block.shape.B, _products(block)
    if B > FEW_ROWS:
        return x
    size = ROWS, block.config.tile_D
    each = [products.cast(x[b], LAYOUT.reduce(0)) for b in range(B)]
    spread = [lax.broadcast_in_dim(row, size, [1]) for row in each]
    return spread[0] if B == 1 else jnp.where(products.iota(size, 0) % 2 == 0, *spread)


def _finish(block: Block, sums: Sums) -> None:
    """What follows the products, and the outputs."""
    memory, (M, B, *_), tile_F = block.memory, block.shape, block.config.tile_F
    cast, out = _products(block).cast, _normed(block, sums)
    if memory.addends is not None:
        plgpu.barrier_wait(memory.addends.at[0])
    parts = [out] if M == 1 else [out[:, :tile_F], out[:, tile_F:]]
    if memory.bias is not None:
        for m, part in enumerate(parts):
            bias = cast(memory.bias_tile[m, pl.ds(0, tile_F)], LAYOUT.reduce(0))
            parts[m] = part + lax.broadcast_in_dim(bias.astype(jnp.float32), part.shape, [1])
    out = parts[0] if M == 1 else parts[0] / (1 + jnp.exp(-parts[0])) * parts[1]
    if memory.residual is not None:
        out = out + cast(memory.row_tile[...], LAYOUT).astype(jnp.float32)
    memory.row_tile[...] = out.astype(memory.row_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory.row_tile.at[pl.ds(0, B)], memory.out.at[:, block.outputs])
    plgpu.wait_smem_to_gmem(0)


def _normed(block: Block, sums: Sums) -> jax.Array:
    """Those of both consumers, after the norm."""
    memory, cast, (out, squares) = block.memory, _products(block).cast, sums
    if block.config.consumers == 2:
        plgpu.barrier_wait(memory.joined.at[0])
        out = out + cast(memory.sums[...], LAYOUT)
        squares = squares + cast(memory.squares[...], LAYOUT.reduce(1))
    if memory.scale is None:
        return out
    return out * over(lax.rsqrt(squares / block.shape.D + block.eps), out)


def _products(block: Block) -> Any:
    return INTERPRETED if block.interpret else TENSOR_CORES
