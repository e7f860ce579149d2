"""Products of one or two rows with a weight, fused with what stands around them in a decoder layer:
the root-mean-square norm before, bias, residual or the gate of the MLP after.

    linear: out[b, f] = sum_d weight[f, d] n[b, d] + bias[f] + residual[b, f]
    gated:  out[b, f] = silu(gate[b, f]) up[b, f], both such sums
    n[b, d] = scale[d] x[b, d] / sqrt(mean_d x[b, d]^2 + eps), or x itself

The norm's divisor is one number a row and is applied to the sums, so that one pass over x yields
both. Everything is summed in float32, residual included, and rounded once.

Time is that of reading the weight, 2 F D bytes in bfloat16: 11 us for 4096 x 4096 at 3 TB/s, and
for small models less than a kernel takes to start; hence one kernel instead of four. Each program
takes `tile_F` outputs and all of D, so there is no second pass. It multiplies and sums by plain
arithmetic. More rows belong to tensor cores, and there XLA's own products with a norm apart are
faster than this scheme was with `dot`: 38 against 51 us a layer of 0.6B parameters, 32 rows, H100.

Source: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467; SwiGLU, Shazeer 2020, arXiv:2002.05202.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.few_row_linear_kernel import Config, Shape, fused_product

MAX_ROWS = 4
SMALL = 2**24  # bytes of a weight; 132 multiprocessors have room for twice as many in registers
LARGE = 2**25  # beyond that, tensor cores and the copy engine are faster where there are such
NUM_PROGRAMS = 512


def linear_reference(
    x: Float[Array, "B D"],
    weight: Float[Array, "F D"],
    *,
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, " F"] | None = None,
    residual: Float[Array, "B F"] | None = None,
) -> Float[Array, "B F"]:
    """The same in plain XLA, each step rounded."""
    if norm_scale is not None:
        wide = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        x = (wide / rms).astype(x.dtype) * norm_scale[None]
    out = jnp.einsum("bd,fd->bf", x, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None]
    out = out.astype(x.dtype)
    return out if residual is None else residual + out


def gated_reference(
    x: Float[Array, "B D"],
    gate_up: Float[Array, "2 F D"],
    *,
    bias: Float[Array, "2 F"] | None = None,
    **norm: Any,
) -> Float[Array, "B F"]:
    """The same in plain XLA, each step rounded."""
    both = gate_up.reshape(-1, gate_up.shape[2])
    out = linear_reference(x, both, bias=None if bias is None else bias.reshape(-1), **norm)
    gate, up = jnp.split(out, 2, axis=1)
    return jax.nn.silu(gate) * up


def few_row_linear(
    x: Float[Array, "B D"],
    weight: Float[Array, "F D"],
    *,
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, " F"] | None = None,
    residual: Float[Array, "B F"] | None = None,
    config: Config | None = None,
    launches_early: bool = False,
    interpret: bool = False,
) -> Float[Array, "B F"]:
    """weight (normed x) + bias + residual. `launches_early`: see `pdl.py`."""
    biases = None if bias is None else bias[None]
    operands = dict(x=x, weight=weight[None], scale=norm_scale, bias=biases, residual=residual)
    return _call(operands, config, eps, launches_early, interpret)


def few_row_gated(
    x: Float[Array, "B D"],
    gate_up: Float[Array, "2 F D"],
    *,
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, "2 F"] | None = None,
    config: Config | None = None,
    launches_early: bool = False,
    interpret: bool = False,
) -> Float[Array, "B F"]:
    """silu(gate (normed x)) * up (normed x). `launches_early`: see `pdl.py`."""
    operands = dict(x=x, weight=gate_up, scale=norm_scale, bias=bias, residual=None)
    return _call(operands, config, eps, launches_early, interpret)


def _call(
    operands: dict[str, Any],
    config: Config | None,
    eps: float,
    launches_early: bool,
    interpret: bool,
) -> Float[Array, "B F"]:
    x, weight = operands["x"], operands["weight"]
    shape = Shape(weight.shape[0], len(x), *weight.shape[1:])
    if reason := unsupported(shape=shape, dtype=x.dtype):
        raise ValueError(f"few_row_linear: {reason}")
    return fused_product(
        operands,
        shape,
        eps=eps,
        config=config or default_config(shape, x.dtype),
        launches_early=launches_early,
        interpret=interpret,
    )


def default_config(shape: Shape, dtype: Any) -> Config:
    """What suits an H100 or H200: each thread has one load of each row of a slice.

    A small weight is under way all at once, in one slice and about four programs a multiprocessor:
    with 8 rows of 1024 inputs or 2 of 3072, 5 to 12 % faster than with 4. Of a large one, programs
    of fewer threads follow each other more smoothly: 8 warps were 2 to 4 % faster than 16.
    """
    M, _, F, D = shape
    size = jnp.dtype(dtype).itemsize
    lanes = 16 // size * 32  # values of a warp, at 16 bytes a thread
    is_small = M * F * D * size <= SMALL
    num_warps = max(4, min(16 if is_small else 8, pl.next_power_of_2(pl.cdiv(D, lanes))))
    tile = 4 // M
    if is_small:
        tile = next((tile for tile in (8 // M, 4) if F >= NUM_PROGRAMS * tile), 2)
    return Config(tile_F=tile, tile_D=lanes * num_warps, num_warps=num_warps)


def is_large(shape: Shape, dtype: Any) -> bool:
    """Whether the weight is such that other kernels are to be preferred."""
    return shape.M * shape.F * shape.D * jnp.dtype(dtype).itemsize > LARGE


def unsupported(*, shape: Shape, dtype: Any) -> str | None:
    """Why the kernel cannot take a product; None where it can."""
    if not 1 <= shape.B <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows, not {shape.B}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype).name}"
    return None


SHAPES = {  # (M, F, D) of the products of a layer
    "qwen3-0.6b": dict(
        qkv=(1, 4096, 1024), out=(1, 1024, 2048), gate_up=(2, 3072, 1024), down=(1, 1024, 3072)
    ),
    "qwen2.5-0.5b": dict(
        qkv=(1, 1152, 896), out=(1, 896, 896), gate_up=(2, 4864, 896), down=(1, 896, 4864)
    ),
    "llama-3.2-1b": dict(
        qkv=(1, 3072, 2048), out=(1, 2048, 2048), gate_up=(2, 8192, 2048), down=(1, 2048, 8192)
    ),
    "llama-3.1-8b": dict(
        qkv=(1, 6144, 4096), out=(1, 4096, 4096), gate_up=(2, 14336, 4096), down=(1, 4096, 14336)
    ),
}
