"""Products of 1, 2 or 8 to 64 rows with a weight on Hopper's tensor cores, fused with what stands
around them in a decoder layer: the root-mean-square norm before, bias, residual or the MLP's gate
after.

    linear: out[b, f] = sum_d weight[f, d] n[b, d] + bias[f] + residual[b, f]
    gated:  out[b, f] = silu(gate[b, f]) up[b, f], both such sums
    n[b, d] = scale[d] x[b, d] / sqrt(mean_d x[b, d]^2 + eps), or x itself

The same as `few_row_linear`, which multiplies one or two rows by plain arithmetic, and compared
with the same references; of such few rows the large weights are for this kernel, which only copies
where the other must multiply in time. The norm's divisor is one number a row and is applied to the
sums.

Time is that of reading the weight, 2 F D bytes, and for small models that of starting a kernel:
hence one kernel where XLA has a norm, a product, a sum of its parts and a gate. Each block has
`tile_F` outputs, so that about as many blocks as there are multiprocessors read the weight once
and none waits for another; each reads all rows, from the L2 cache. A layer of Qwen3-0.6B takes 24.5
us at 32 rows on an H200, 30.5 with cuBLAS, and 7 for its bytes; of Llama-3.1-8B 121, 136 and 103.

Source: as `few_row_linear`; the ring of slots as in FlashAttention-3, Shah et al. 2024,
arXiv:2407.08608.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.pallas_kernels import few_row_linear
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.mosaic import BLOCKS, SHARED_MEMORY
from jaxengine.pallas_kernels.small_batch_linear_kernel import fused_product, shared_memory
from jaxengine.pallas_kernels.small_batch_linear_producer import FEW_ROWS, ROWS, Config

MAX_WIDTH = 256  # outputs of a block, those of both weights together: of a tensor core instruction
MIN_STAGES, MAX_STAGES = 4, 8


def small_batch_linear(
    x: Float[Array, "B D"],
    weight: Float[Array, "F D"],
    *,
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, " F"] | None = None,
    residual: Float[Array, "B F"] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B F"]:
    """weight (normed x) + bias + residual, summed in float32 and rounded once.

    Raises:
        ValueError: shapes or a dtype that the kernel is not made for.
    """
    biases = None if bias is None else bias[None]
    operands = dict(x=x, weight=weight[None], scale=norm_scale, bias=biases, residual=residual)
    return _call(operands, config, eps, interpret)


def small_batch_gated(
    x: Float[Array, "B D"],
    gate_up: Float[Array, "2 F D"],
    *,
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, "2 F"] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B F"]:
    """silu(gate (normed x)) * up (normed x), likewise."""
    operands = dict(x=x, weight=gate_up, scale=norm_scale, bias=bias, residual=None)
    return _call(operands, config, eps, interpret)


def _call(
    operands: dict[str, Any],
    config: Config | None,
    eps: float,
    interpret: bool,
) -> Float[Array, "B F"]:
    x, weight = operands["x"], operands["weight"]
    shape = Shape(weight.shape[0], len(x), *weight.shape[1:])
    if reason := unsupported(shape=shape, dtype=x.dtype):
        raise ValueError(f"small_batch_linear: {reason}")
    return fused_product(
        operands,
        shape,
        eps=eps,
        config=config or default_config(shape, has_norm=operands["scale"] is not None),
        interpret=interpret,
    )


def default_config(shape: Shape, *, has_norm: bool) -> Config:
    """What suits an H100 or H200: slices as wide as leave room for a few, and two consumers where
    there is more to wait for than to multiply. Wide ones are for narrow weights."""
    tile_F = _tile_F(shape)
    assert tile_F is not None, "it is supported"
    in_registers = has_norm or shape.B <= FEW_ROWS
    widest = 256 if tile_F < 32 and not in_registers else 128
    for tile_D in (size for size in (256, 128, 64) if size <= widest and shape.D % size == 0):
        num_slices = shape.D // tile_D
        consumers = 2 if shape.M * tile_F <= 64 and num_slices > 1 else 1
        config = Config(tile_F=tile_F, tile_D=tile_D, stages=0, consumers=consumers)
        fixed = shared_memory(shape, config)
        slot = shared_memory(shape, replace(config, stages=1)) - fixed
        stages = min(MAX_STAGES, (SHARED_MEMORY - fixed) // slot, num_slices)
        config = replace(config, stages=stages - stages % consumers)
        if stages >= MIN_STAGES:
            break
    return config


def _tile_F(shape: Shape) -> int | None:
    """Outputs of a block, so that all blocks run at once."""
    for tile in range(8, MAX_WIDTH // shape.M + 1, 8):
        if shape.F % tile == 0 and shape.F // tile <= BLOCKS:
            return tile
    return None


def unsupported(*, shape: Shape, dtype: Any) -> str | None:
    """Why the kernel cannot take a product; None where it can."""
    if not 1 <= shape.B <= FEW_ROWS and (shape.B % 8 or not 8 <= shape.B <= ROWS):
        return f"it takes 1, 2, 8, 16, ... to {ROWS} rows, not {shape.B}"
    if shape.D % 64 or _tile_F(shape) is None:
        return f"it has no tiles for {shape.F} outputs of {shape.D} inputs"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    return None


SHAPES = few_row_linear.SHAPES
