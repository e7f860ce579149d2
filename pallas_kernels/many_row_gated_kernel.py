"""The kernel behind `many_row_gated.py`, which says what it computes.

A producer copies slices of rows and of both weights to a ring of slots in shared memory; two
consumers, each with half of a tile's rows, multiply them and write the outputs. The producer goes
on with the next tile meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.mosaic import FEW_REGISTERS, REGISTERS, warpgroup_kernel
from jaxengine.pallas_kernels.ragged_extend_products import INTERPRETED, LAYOUT, TENSOR_CORES

CONSUMERS = 2
ROWS = 64  # of a tensor core instruction
BLOCK_ROWS = CONSUMERS * ROWS
TILE_D = 64  # inputs of a slice
GROUP = 16  # tiles of rows that go with a tile of outputs before the next


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result."""

    tile_F: int  # outputs of a tile, of each weight: a multiple of 8
    num_blocks: int  # that take turns at the tiles
    stages: int = 4  # slices under way


class Memory(NamedTuple):
    """Arrays in global memory, then shared memory, then barriers."""

    x: Any  # [T D]
    weight: Any  # [2 F, D]
    out: Any  # [T F]
    x_tiles: Any  # [stages BLOCK_ROWS TILE_D]
    weight_tiles: Any  # [stages, 2 tile_F, TILE_D]
    out_tiles: Any  # [CONSUMERS ROWS tile_F]
    full: Any  # a slot each
    free: Any


class Block(NamedTuple):
    """What the warpgroups of a block share."""

    T: int
    F: int
    D: int
    config: Config
    memory: Memory
    interpret: bool

    @property
    def num_slices(self) -> int:
        return self.D // TILE_D

    @property
    def num_turns(self) -> Any:
        """Tiles of this block."""
        rest = num_tiles(self.T, self.F, self.config) - lax.axis_index("block")
        return lax.div(rest + self.config.num_blocks - 1, self.config.num_blocks)

    def tile(self, turn: Any) -> tuple[Any, Any]:
        """The first row and the first output."""
        of_rows, of_outputs = self.T // BLOCK_ROWS, self.F // self.config.tile_F
        index = lax.axis_index("block") + turn * self.config.num_blocks
        group = lax.div(index, GROUP * of_outputs)
        within = index - group * GROUP * of_outputs
        size = jnp.minimum(of_rows - group * GROUP, GROUP)
        row = (group * GROUP + lax.rem(within, size)) * BLOCK_ROWS
        output = lax.div(within, size) * self.config.tile_F
        return pl.multiple_of(row, BLOCK_ROWS), pl.multiple_of(output, self.config.tile_F)

    def slot(self, index: Any) -> Any:
        return lax.rem(index, self.config.stages)


def num_tiles(T: int, F: int, config: Config) -> int:
    return T // BLOCK_ROWS * (F // config.tile_F)


def shared_memory(config: Config) -> int:
    """Bytes of a block, barriers apart."""
    slot = 2 * TILE_D * (BLOCK_ROWS + 2 * config.tile_F)
    return config.stages * slot + 2 * BLOCK_ROWS * config.tile_F


def gated_product(
    x: Float[Array, "T D"], gate_up: Float[Array, "2 F D"], config: Config, interpret: bool
) -> Float[Array, "T F"]:
    (T, D), F = x.shape, gate_up.shape[1]
    results = (jax.ShapeDtypeStruct((T, F), x.dtype),)
    kernel = lowered_once(_kernel, T, F, D, config, results=results, interpret=interpret)
    (out,) = kernel(x, gate_up.reshape(-1, D))
    return out


def _kernel(
    T: int,
    F: int,
    D: int,
    config: Config,
    results: tuple[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., tuple[jax.Array]]:
    """The call (x, weight [2 F, D]) -> out [T F]."""

    def body(x: Any, weight: Any, out: Any, **own: Any) -> None:
        _run_warpgroup(Block(T, F, D, config, Memory(x, weight, out, **own), interpret))

    return warpgroup_kernel(
        body,
        results=results,
        scratch=_scratch(config, results[0].dtype),
        num_blocks=min(config.num_blocks, num_tiles(T, F, config)),
        num_warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )


def _scratch(config: Config, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `Memory`."""
    stages, tile_F = config.stages, config.tile_F
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    of_outputs = () if tile_F % 64 else tiled
    return dict(
        x_tiles=plgpu.SMEM((stages, BLOCK_ROWS, TILE_D), dtype, transforms=tiled),
        weight_tiles=plgpu.SMEM((stages, 2 * tile_F, TILE_D), dtype, transforms=tiled),
        out_tiles=plgpu.SMEM((CONSUMERS, ROWS, tile_F), dtype, transforms=of_outputs),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )


def _run_warpgroup(block: Block) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        lax.fori_loop(0, block.num_turns, lambda turn, _: _compute(block, warpgroup, turn), None)
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
    memory, tile_F, (row, output) = block.memory, block.config.tile_F, block.tile(turn)

    def copy(k: Any, _: None) -> None:
        index = turn * block.num_slices + k
        slot, across = block.slot(index), pl.ds(pl.multiple_of(k * TILE_D, TILE_D), TILE_D)
        free, full = memory.free.at[slot], memory.full.at[slot]
        pl.when(index >= block.config.stages)(lambda: plgpu.barrier_wait(free))
        source = memory.x.at[pl.ds(row, BLOCK_ROWS), across]
        plgpu.copy_gmem_to_smem(source, memory.x_tiles.at[slot], full)
        for m in range(2):
            source = memory.weight.at[pl.ds(m * block.F + output, tile_F), across]
            target = memory.weight_tiles.at[slot, pl.ds(m * tile_F, tile_F)]
            plgpu.copy_gmem_to_smem(source, target, full)

    lax.fori_loop(0, block.num_slices, copy, None)


def _compute(block: Block, consumer: jax.Array, turn: Any) -> None:
    """A consumer's outputs of a tile."""
    memory, tile_F, (row, output) = block.memory, block.config.tile_F, block.tile(turn)
    sums = _sums(block, consumer, turn)
    gate, up = sums[:, :tile_F], sums[:, tile_F:]
    out = gate / (1 + jnp.exp(-gate)) * up
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the tile before
    memory.out_tiles[consumer] = out.astype(memory.out_tiles.dtype)
    plgpu.commit_smem()
    target = memory.out.at[pl.ds(row + consumer * ROWS, ROWS), pl.ds(output, tile_F)]
    plgpu.copy_smem_to_gmem(memory.out_tiles.at[consumer], target)


def _sums(block: Block, consumer: jax.Array, turn: Any) -> jax.Array:
    """x weight' for the consumer's rows, [ROWS, 2 tile_F]."""
    memory = block.memory
    products = INTERPRETED if block.interpret else TENSOR_CORES

    def add(k: Any, sums: jax.Array) -> jax.Array:
        slot = block.slot(turn * block.num_slices + k)
        plgpu.barrier_wait(memory.full.at[slot])
        x = memory.x_tiles.at[slot, pl.ds(consumer * ROWS, ROWS)]
        sums = products.add(sums, x, memory.weight_tiles.at[slot])
        plgpu.barrier_arrive(memory.free.at[slot])
        return sums

    zeros = products.cast(jnp.zeros((ROWS, 2 * block.config.tile_F), jnp.float32), LAYOUT)
    return lax.fori_loop(0, block.num_slices, add, zeros)
