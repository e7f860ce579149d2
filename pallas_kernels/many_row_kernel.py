"""What kernels of many rows on Hopper's tensor cores share: all but what they make of the sums.

A producer copies slices of rows and weights to a ring of slots in shared memory; two consumers,
each with half of a tile's rows, multiply them and finish the tile in their own way. The producer
goes on with the next tile meanwhile.

Blocks take tile after tile, in an order in which the rows and weights of neighbours meet in the L2
cache. Where outputs are no multiple of a tile's, the last tile begins early and has some of the one
before again.

Source: blocks that stay and copy ahead of what they multiply as in FlashAttention-3, Shah et al.
2024, arXiv:2407.08608.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.mosaic import FEW_REGISTERS, REGISTERS, warpgroup_kernel
from jaxengine.pallas_kernels.ragged_extend_products import (
    INTERPRETED,
    LAYOUT,
    TENSOR_CORES,
    Products,
)

CONSUMERS = 2
ROWS = 64  # of a tensor core instruction
BLOCK_ROWS = CONSUMERS * ROWS
TILE_D = 64  # inputs of a slice
GROUP = 16  # tiles of rows that go with a tile of outputs before the next


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    tile_F: int  # outputs of a tile, of each weight: a multiple of 8
    num_blocks: int  # that take turns at the tiles
    stages: int = 4  # slices under way


class Memory(NamedTuple):
    """Arrays in global memory, then shared memory, then barriers."""

    x: Any  # [B D]
    weight: Any  # [M F, D]
    num_rows: Any  # [1]: rows that count, or None if all do
    out: Any
    x_tiles: Any  # [stages BLOCK_ROWS TILE_D]
    weight_tiles: Any  # [stages, M tile_F, TILE_D]
    out_tiles: Any  # of each consumer, as it wants them
    full: Any  # a slot each
    free: Any


class Tile(NamedTuple):
    """Of a turn."""

    row: Any  # its first
    output: Any  # likewise, of each weight
    number: Any  # of its outputs among the tiles of a row


class Block(NamedTuple):
    """What the warpgroups of a block share."""

    shape: Shape
    config: Config
    memory: Memory
    interpret: bool

    @property
    def products(self) -> Products:
        return INTERPRETED if self.interpret else TENSOR_CORES

    @property
    def num_slices(self) -> int:
        return self.shape.D // TILE_D

    @property
    def num_row_tiles(self) -> Any:
        if self.memory.num_rows is None:
            return self.shape.B // BLOCK_ROWS
        return lax.div(self.memory.num_rows[0] + (BLOCK_ROWS - 1), BLOCK_ROWS)

    @property
    def num_turns(self) -> Any:
        """Tiles of this block."""
        num_tiles = self.num_row_tiles * num_output_tiles(self.shape, self.config)
        rest = num_tiles - lax.axis_index("block")
        return lax.div(rest + (self.config.num_blocks - 1), self.config.num_blocks)

    def tile(self, turn: Any) -> Tile:
        of_rows, of_outputs = self.num_row_tiles, num_output_tiles(self.shape, self.config)
        tile_F = self.config.tile_F
        index = lax.axis_index("block") + turn * self.config.num_blocks
        group = lax.div(index, GROUP * of_outputs)
        within = index - group * GROUP * of_outputs
        size = jnp.minimum(of_rows - group * GROUP, GROUP)
        row = (group * GROUP + lax.rem(within, size)) * BLOCK_ROWS
        number = lax.div(within, size)
        output = pl.multiple_of(number * tile_F, tile_F)
        if self.shape.F % tile_F:
            output = pl.multiple_of(jnp.minimum(number * tile_F, self.shape.F - tile_F), 8)
        return Tile(pl.multiple_of(row, BLOCK_ROWS), output, number)

    def slot(self, index: Any) -> Any:
        return lax.rem(index, self.config.stages)


Finish = Callable[[Block, jax.Array, Tile, jax.Array], None]
"""Writes what is to be of the sums [ROWS, M tile_F] of a consumer of that number in the tile."""


def num_output_tiles(shape: Shape, config: Config) -> int:
    return pl.cdiv(shape.F, config.tile_F)


def num_tiles(shape: Shape, config: Config) -> int:
    return shape.B // BLOCK_ROWS * num_output_tiles(shape, config)


def ring_bytes(M: int, config: Config) -> int:
    """Shared memory of a block for rows and weights, barriers apart."""
    return 2 * config.stages * TILE_D * (BLOCK_ROWS + M * config.tile_F)


def many_row_kernel(
    shape: Shape,
    config: Config,
    finish: Finish,
    out_tiles: Any,  # its shared memory
    *,
    counts_rows: bool,
    results: tuple[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., tuple[jax.Array]]:
    """The call (x [B D], weight [M F, D], where it `counts_rows` how many count [1]) -> result."""

    def body(x: Any, weight: Any, *refs: Any, **own: Any) -> None:
        num_rows, out = refs if counts_rows else (None, *refs)
        memory = Memory(x, weight, num_rows, out, **own)
        _run_warpgroup(Block(shape, config, memory, interpret), finish)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    weights = (config.stages, shape.M * config.tile_F, TILE_D)
    return warpgroup_kernel(
        body,
        results=results,
        scratch=dict(
            x_tiles=plgpu.SMEM((config.stages, BLOCK_ROWS, TILE_D), jnp.bfloat16, transforms=tiled),
            weight_tiles=plgpu.SMEM(weights, jnp.bfloat16, transforms=tiled),
            out_tiles=out_tiles,
            full=plgpu.Barrier(num_arrivals=1 + shape.M, num_barriers=config.stages),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
        ),
        num_blocks=min(config.num_blocks, num_tiles(shape, config)),
        num_warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )


def _run_warpgroup(block: Block, finish: Finish) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")

        def compute(turn: Any, _: None) -> None:
            tile = block.tile(turn)
            finish(block, warpgroup, tile, _sums(block, warpgroup, turn))

        lax.fori_loop(0, block.num_turns, compute, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        lax.fori_loop(0, block.num_turns, lambda turn, _: _copy(block, turn), None)
        total = block.num_turns * block.num_slices

        def drain(index: Any, _: None) -> None:  # interpreters insist that every phase is seen
            plgpu.barrier_wait(block.memory.free.at[block.slot(index)])

        lax.fori_loop(jnp.maximum(total - block.config.stages, 0), total, drain, None)


def _copy(block: Block, turn: Any) -> None:
    """The slices of a tile."""
    memory, tile_F, tile = block.memory, block.config.tile_F, block.tile(turn)

    def copy(k: Any, _: None) -> None:
        index = turn * block.num_slices + k
        slot, across = block.slot(index), pl.ds(pl.multiple_of(k * TILE_D, TILE_D), TILE_D)
        free, full = memory.free.at[slot], memory.full.at[slot]
        pl.when(index >= block.config.stages)(lambda: plgpu.barrier_wait(free))
        source = memory.x.at[pl.ds(tile.row, BLOCK_ROWS), across]
        plgpu.copy_gmem_to_smem(source, memory.x_tiles.at[slot], full)
        for m in range(block.shape.M):
            source = memory.weight.at[pl.ds(m * block.shape.F + tile.output, tile_F), across]
            target = memory.weight_tiles.at[slot, pl.ds(m * tile_F, tile_F)]
            plgpu.copy_gmem_to_smem(source, target, full)

    lax.fori_loop(0, block.num_slices, copy, None)


def _sums(block: Block, consumer: jax.Array, turn: Any) -> jax.Array:
    """x weight' for the consumer's rows, [ROWS, M tile_F]."""
    memory, products = block.memory, block.products

    def add(k: Any, sums: jax.Array) -> jax.Array:
        slot = block.slot(turn * block.num_slices + k)
        plgpu.barrier_wait(memory.full.at[slot])
        x = memory.x_tiles.at[slot, pl.ds(consumer * ROWS, ROWS)]
        sums = products.add(sums, x, memory.weight_tiles.at[slot])
        plgpu.barrier_arrive(memory.free.at[slot])
        return sums

    width = block.shape.M * block.config.tile_F
    zeros = products.cast(jnp.zeros((ROWS, width), jnp.float32), LAYOUT)
    return lax.fori_loop(0, block.num_slices, add, zeros)
