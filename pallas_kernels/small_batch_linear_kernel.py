"""The kernel behind `small_batch_linear.py`, which says what it computes.

A block has some outputs and all inputs. A producer copies slices of the weight and of all rows to a
ring of slots in shared memory; one or two consumers multiply on tensor cores, each the slices of
its own turns, and the first adds up their sums and writes the outputs:

    producer    w0 x0 w1 x1 w2 x2 w3 x3 ...
    consumer 0        |  0        |  2        | + the other's | norm, bias, gate, residual | out
    consumer 1              |  1        |  3  |

The rows are the 64 of a tensor core instruction. Those beyond the batch hold what was there before,
or of one or two rows copies, and nothing of them leaves the block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.mosaic import FEW_REGISTERS, REGISTERS, warpgroup_kernel
from jaxengine.pallas_kernels.small_batch_linear_consumer import consume
from jaxengine.pallas_kernels.small_batch_linear_producer import (
    FEW_ROWS,
    ROWS,
    Block,
    Config,
    Memory,
    produce,
)


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
    slot = 2 * config.tile_D * (_num_x_rows(shape) + width + 1)
    partial_sums = 4 * ROWS * (width + 1) if config.consumers == 2 else 0
    addends = 2 * (ROWS * config.tile_F + shape.M * _padded(config.tile_F))
    return config.stages * slot + partial_sums + addends


def _num_x_rows(shape: Shape) -> int:
    """Of a slot."""
    return shape.B if shape.B <= FEW_ROWS else ROWS


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
    scratch = _scratch(names, shape, config, results[0].dtype)

    def body(*refs: Any, **own: Any) -> None:
        given = dict(zip((*names, "out"), refs, strict=True)) | own
        memory = Memory(**{name: given.get(name) for name in Memory._fields})
        _run_warpgroup(Block(shape, config, eps, memory, interpret))

    return warpgroup_kernel(
        body,
        results=results,
        scratch=scratch,
        num_blocks=shape.F // config.tile_F,
        num_warpgroups=config.consumers + 1,
        interpret=interpret,
    )


def _run_warpgroup(block: Block) -> None:
    warpgroup, consumers = lax.axis_index("warpgroup"), block.config.consumers

    @pl.when(warpgroup < consumers)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        consume(block, warpgroup)

    @pl.when(warpgroup == consumers)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        produce(block)


def _scratch(names: tuple[str, ...], shape: Shape, config: Config, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `Memory`."""
    stages, tile_D = config.stages, config.tile_D
    width = shape.M * config.tile_F
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    copies = 1 + shape.M + ("scale" in names)
    addends = shape.M * ("bias" in names) + ("residual" in names)
    scratch = dict(
        x_tiles=plgpu.SMEM(
            (stages, _num_x_rows(shape), tile_D),
            dtype,
            transforms=() if shape.B <= FEW_ROWS else tiled,
        ),
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
    return scratch
