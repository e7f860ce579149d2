"""The kernel behind `small_batch_linear.py`, which says what it computes.

A block has some outputs and all inputs. A producer copies slices of the weight and of all rows to a
ring of slots in shared memory; one or two consumers multiply on tensor cores, each the slices of
its own turns, and the first adds up their sums and writes the outputs:

    producer    w0 x0 w1 x1 w2 x2 w3 x3 ...
    consumer 0        |  0        |  2        | + the other's | norm, bias, gate, residual | out
    consumer 1              |  1        |  3  |

The rows are the 64 of a tensor core instruction. Those beyond the batch hold what was there before,
and nothing of them leaves the block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.mosaic import interpreter
from jaxengine.pallas_kernels.ragged_extend_products import (
    ACC,
    INTERPRETED,
    LAYOUT,
    TENSOR_CORES,
    over,
)

ROWS = 64  # of a tensor core instruction
REGISTERS, FEW_REGISTERS = 232, 40  # of a thread that computes, and of one that copies


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    tile_F: int  # outputs of a block, of each weight: a multiple of 8
    tile_D: int  # inputs of a slice: a multiple of 64
    stages: int  # slices under way: a multiple of the consumers, so that a slot is always of one
    consumers: int = 2


class Memory(NamedTuple):
    """Arrays in global memory, then shared memory, then barriers. None: there is no such array."""

    x: Any  # [B D]
    weight: Any  # [M F, D]
    scale: Any  # [D]
    bias: Any  # [M F]
    residual: Any  # [B F]
    out: Any  # [B F]
    x_tiles: Any  # [stages ROWS tile_D]
    weight_tiles: Any  # [stages, M tile_F, tile_D]
    scale_tiles: Any  # [stages tile_D]
    bias_tile: Any  # [M, tile_F and more]: copies go to multiples of 128 bytes
    row_tile: Any  # [ROWS tile_F]: of the residual, then of the outputs
    sums: Any  # [ROWS, M tile_F] of the second consumer
    squares: Any  # [ROWS]
    full: Any  # a slot each
    free: Any
    addends: Any  # bias and residual are there
    joined: Any  # the second consumer's sums are


def fused_product(
    operands: dict[str, Any],
    shape: Shape,
    *,
    eps: float,
    config: Config,
    interpret: bool,
) -> Float[Array, "B F"]:
    """The product of `x` and `weight` [M F D], with whichever of `scale`, `bias` [M F] and
    `residual` are not None."""
    M, B, F, D = shape
    flat = dict(weight=(M * F, D), bias=(M * F,))
    arrays = {
        name: array.reshape(flat.get(name, array.shape))
        for name, array in operands.items()
        if array is not None
    }
    results = (jax.ShapeDtypeStruct((B, F), operands["x"].dtype),)
    static = tuple(arrays), shape, eps, config
    (out,) = lowered_once(_kernel, *static, results=results, interpret=interpret)(*arrays.values())
    return out


def shared_memory(shape: Shape, config: Config) -> int:
    """Bytes of a block, barriers apart."""
    width = shape.M * config.tile_F
    slot = 2 * config.tile_D * (ROWS + width + 1)
    partial_sums = 4 * ROWS * (width + 1) if config.consumers == 2 else 0
    addends = 2 * (ROWS * config.tile_F + shape.M * _padded(config.tile_F))
    return config.stages * slot + partial_sums + addends


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _kernel(
    names: tuple[str, ...],
    shape: Shape,
    eps: float,
    config: Config,
    results: tuple[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., tuple[jax.Array]]:
    """The call (operands of these names) -> out [B F]."""
    dtype, stages, tile_D = results[0].dtype, config.stages, config.tile_D
    width = shape.M * config.tile_F
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    copies = 1 + shape.M + ("scale" in names)
    addends = shape.M * ("bias" in names) + ("residual" in names)
    scratch = dict(
        x_tiles=plgpu.SMEM((stages, ROWS, tile_D), dtype, transforms=tiled),
        weight_tiles=plgpu.SMEM((stages, width, tile_D), dtype, transforms=tiled),
        row_tile=plgpu.SMEM((ROWS, config.tile_F), dtype),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    )
    if "scale" in names:
        scratch |= dict(scale_tiles=plgpu.SMEM((stages, tile_D), dtype))
    if "bias" in names:
        scratch |= dict(bias_tile=plgpu.SMEM((shape.M, _padded(config.tile_F)), dtype))
    if addends:
        scratch |= dict(addends=plgpu.Barrier(num_arrivals=addends, num_barriers=1))
    if config.consumers == 2:
        scratch |= dict(
            sums=plgpu.SMEM((ROWS, width), jnp.float32),
            squares=plgpu.SMEM((ROWS,), jnp.float32),
            joined=plgpu.Barrier(num_arrivals=1, num_barriers=1),
        )

    def body(*refs: Any, **own: Any) -> None:
        given = dict(zip((*names, "out"), refs, strict=True)) | own
        memory = Memory(**{name: given.get(name) for name in Memory._fields})
        _run_warpgroup(Block(shape, config, eps, memory, interpret))

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(shape.F // config.tile_F,),
        grid_names=("block",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter() if interpret else False,
    )


class Block(NamedTuple):
    """What the warpgroups of a block share."""

    shape: Shape
    config: Config
    eps: float
    memory: Memory
    interpret: bool

    @property
    def num_slices(self) -> int:
        return self.shape.D // self.config.tile_D

    @property
    def outputs(self) -> Any:
        """Those of the block, of the first weight."""
        size = self.config.tile_F
        return pl.ds(pl.multiple_of(lax.axis_index("block") * size, size), size)

    def slot(self, index: Any) -> Any:
        return lax.rem(index, self.config.stages)


def _run_warpgroup(block: Block) -> None:
    warpgroup, consumers = lax.axis_index("warpgroup"), block.config.consumers

    @pl.when(warpgroup < consumers)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        _consume(block, warpgroup)

    @pl.when(warpgroup == consumers)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        _produce(block)


def _produce(block: Block) -> None:
    memory, (M, B, F, _) = block.memory, block.shape
    tile_F, tile_D, stages = block.config.tile_F, block.config.tile_D, block.config.stages
    first, num_slices = block.outputs.start, block.num_slices

    def across(index: Any) -> Any:
        return pl.ds(pl.multiple_of(index * tile_D, tile_D), tile_D)

    if memory.bias is not None:
        for m in range(M):
            source = memory.bias.at[pl.ds(m * F + first, tile_F)]
            target = memory.bias_tile.at[m, pl.ds(0, tile_F)]
            plgpu.copy_gmem_to_smem(source, target, memory.addends.at[0])
    if memory.residual is not None:
        source, target = memory.residual.at[:, block.outputs], memory.row_tile.at[pl.ds(0, B)]
        plgpu.copy_gmem_to_smem(source, target, memory.addends.at[0])

    def copy(index: Any, _: None) -> None:
        slot = block.slot(index)
        full = memory.full.at[slot]
        pl.when(index >= stages)(lambda: plgpu.barrier_wait(memory.free.at[slot]))
        for m in range(M):
            source = memory.weight.at[pl.ds(m * F + first, tile_F), across(index)]
            target = memory.weight_tiles.at[slot, pl.ds(m * tile_F, tile_F)]
            plgpu.copy_gmem_to_smem(source, target, full)
        rows = memory.x_tiles.at[slot, pl.ds(0, B)]
        plgpu.copy_gmem_to_smem(memory.x.at[:, across(index)], rows, full)
        if memory.scale is not None:
            target = memory.scale_tiles.at[slot]
            plgpu.copy_gmem_to_smem(memory.scale.at[across(index)], target, full)

    def drain(index: Any, _: None) -> None:  # interpreters insist that every phase is seen
        plgpu.barrier_wait(memory.free.at[block.slot(index)])

    lax.fori_loop(0, num_slices, copy, None)
    lax.fori_loop(max(num_slices - stages, 0), num_slices, drain, None)


class Sums(NamedTuple):
    """Of all rows, over the slices so far."""

    products: jax.Array  # [ROWS, M tile_F]
    squares: jax.Array  # [ROWS], of the rows themselves


def _consume(block: Block, consumer: jax.Array) -> None:
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
    x, weight, squares = memory.x_tiles.at[slot], memory.weight_tiles.at[slot], sums.squares
    if memory.scale is not None:
        wide = products.cast(x[...], LAYOUT).astype(jnp.float32)
        scale = products.cast(memory.scale_tiles[slot], LAYOUT.reduce(0)).astype(jnp.float32)
        squares = squares + (wide * wide).sum(axis=1)
        x = (wide * lax.broadcast_in_dim(scale, wide.shape, [1])).astype(x.dtype)
    multiply = _multiplied if block.interpret else _multiply
    summed = multiply(sums.products, x, weight)
    plgpu.barrier_arrive(memory.free.at[slot])
    return Sums(summed, squares)


def _multiply(sums: jax.Array, x: Any, weight: Any) -> jax.Array:
    """sums + x weight', where x is in registers or in shared memory."""
    result: Any = pl.run_state(lambda out: plgpu.wgmma(out, x, weight.T))(ACC.init(sums))
    return result


def _multiplied(sums: jax.Array, x: Any, weight: Any) -> jax.Array:
    """The same for interpreters, which know no products from registers."""
    return sums + jnp.dot(x[...], weight[...].T, preferred_element_type=jnp.float32)


def _finish(block: Block, sums: Sums) -> None:
    """What follows the products, and the outputs."""
    memory, (M, B, _, D), tile_F = block.memory, block.shape, block.config.tile_F
    cast = _products(block).cast
    out, squares = sums
    if block.config.consumers == 2:
        plgpu.barrier_wait(memory.joined.at[0])
        out = out + cast(memory.sums[...], LAYOUT)
        squares = squares + cast(memory.squares[...], LAYOUT.reduce(1))
    if memory.scale is not None:
        out = out * over(lax.rsqrt(squares / D + block.eps), out)
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


def _products(block: Block) -> Any:
    return INTERPRETED if block.interpret else TENSOR_CORES
