"""The producer of `small_batch_linear`'s kernel, and what both sides of it know: the tuning, the
memory of a block and what the block works on.

It copies the addends, then slice after slice of the weight and of all rows to a ring of slots in
shared memory, each slot again when the consumer whose it is has let go of it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.few_row_linear_kernel import Shape

ROWS = 64  # of a tensor core instruction
FEW_ROWS = 2  # that are kept apart: the copy engine lays out 8 at a time for tensor cores


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
    x_tiles: Any  # [stages ROWS tile_D]; of few rows [stages B tile_D]
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


def produce(block: Block) -> None:
    _copy_addends(block)
    num_slices, stages = block.num_slices, block.config.stages
    lax.fori_loop(0, num_slices, lambda index, _: _copy_slice(block, index), None)

    def drain(index: Any, _: None) -> None:  # interpreters insist that every phase is seen
        plgpu.barrier_wait(block.memory.free.at[block.slot(index)])

    lax.fori_loop(max(num_slices - stages, 0), num_slices, drain, None)


def _copy_addends(block: Block) -> None:
    memory, (M, B, F, _), tile_F = block.memory, block.shape, block.config.tile_F
    if memory.bias is not None:
        for m in range(M):
            source = memory.bias.at[pl.ds(m * F + block.outputs.start, tile_F)]
            target = memory.bias_tile.at[m, pl.ds(0, tile_F)]
            plgpu.copy_gmem_to_smem(source, target, memory.addends.at[0])
    if memory.residual is not None:
        source, target = memory.residual.at[:, block.outputs], memory.row_tile.at[pl.ds(0, B)]
        plgpu.copy_gmem_to_smem(source, target, memory.addends.at[0])


def _copy_slice(block: Block, index: Any) -> None:
    memory, (M, B, F, _), slot = block.memory, block.shape, block.slot(index)
    tile_F, tile_D, full = block.config.tile_F, block.config.tile_D, memory.full.at[slot]
    pl.when(index >= block.config.stages)(lambda: plgpu.barrier_wait(memory.free.at[slot]))
    across = pl.ds(pl.multiple_of(index * tile_D, tile_D), tile_D)
    for m in range(M):
        source = memory.weight.at[pl.ds(m * F + block.outputs.start, tile_F), across]
        target = memory.weight_tiles.at[slot, pl.ds(m * tile_F, tile_F)]
        plgpu.copy_gmem_to_smem(source, target, full)
    plgpu.copy_gmem_to_smem(memory.x.at[:, across], memory.x_tiles.at[slot, pl.ds(0, B)], full)
    if memory.scale is not None:
        plgpu.copy_gmem_to_smem(memory.scale.at[across], memory.scale_tiles.at[slot], full)
