"""The kernel behind `few_row_linear.py`, which says what it computes: one program for each tile of
outputs, over the whole input axis."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.pdl import launch_dependents


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding. Tiles are powers of two."""

    tile_F: int  # outputs of a program, of each weight
    tile_D: int  # inputs whose loads are under way together; 16 bytes by 32 lanes are 256 bfloat16
    num_warps: int


class Shape(NamedTuple):
    """Of one product: `M` weights (gate and up, or one) of [F D], and B rows."""

    M: int
    B: int
    F: int
    D: int


def fused_product(
    operands: dict[str, Any],
    shape: Shape,
    *,
    eps: float,
    config: Config,
    launches_early: bool,
    interpret: bool,
) -> Float[Array, "B F"]:
    """The product of `x` and `weight` [M F D], with whichever of `scale`, `bias` [M F] and
    `residual` are not None."""
    arrays = {name: array for name, array in operands.items() if array is not None}
    static = tuple(arrays), shape, eps, config, launches_early
    results = (jax.ShapeDtypeStruct((shape.B, shape.F), operands["x"].dtype),)
    kernel = lowered_once(_call, *static, results=results, interpret=interpret)
    (out,) = kernel(*arrays.values())
    return out


def _call(
    names: tuple[str, ...],
    shape: Shape,
    eps: float,
    config: Config,
    launches_early: bool,
    results: tuple[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., tuple[jax.Array]]:
    """The call (operands of these names) -> out [B F]."""
    tile, width = config.tile_F, pl.cdiv(shape.D, config.tile_D) * config.tile_D
    rows = pl.BlockSpec((shape.B, tile), lambda i: (0, i))
    specs = dict(  # blocks may reach beyond the arrays: every access is masked
        x=pl.BlockSpec((shape.B, width), lambda i: (0, 0)),
        weight=pl.BlockSpec((shape.M, tile, width), lambda i: (0, i, 0)),
        scale=pl.BlockSpec((width,), lambda i: (0,)),
        bias=pl.BlockSpec((shape.M, tile), lambda i: (0, i)),
        residual=rows,
    )
    return pl.pallas_call(
        partial(
            _kernel,
            names=(*names, "out"),
            shape=shape,
            config=config,
            eps=eps,
            launches_early=launches_early,
            interpret=interpret,
        ),
        out_shape=results,
        grid=(pl.cdiv(shape.F, tile),),
        in_specs=[specs[name] for name in names],
        out_specs=(rows,),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="few_row_linear" if shape.M == 1 else "few_row_gated",
        interpret=interpret,
    )


class Program(NamedTuple):
    """What the parts of the kernel share."""

    ref: dict[str, Any]
    index: Array  # which tile of F
    end: Any  # D, as the compiler is to know it
    shape: Shape
    config: Config
    interpret: bool


def _kernel(
    *refs: Any,
    names: tuple[str, ...],
    shape: Shape,
    config: Config,
    eps: float,
    launches_early: bool,
    interpret: bool,
) -> None:
    i, end = pl.program_id(0), shape.D
    if launches_early:  # steps of 64 let the compiler see that 16 bytes are masked as one
        end += 64 * launch_dependents(jnp.zeros(1, jnp.int32))
    ref = dict(zip(names, refs, strict=True))
    program = Program(ref, i, end, shape, config, interpret)
    biases, residuals = _addends(program)
    sums, squares = _sums(program)
    for b in range(shape.B):
        out = [of_weight[b] for of_weight in sums]
        if "scale" in program.ref:
            factor = lax.rsqrt(squares[b] / shape.D + eps)[:, None]
            out = [one * factor for one in out]
        out = [one + bias for one, bias in zip(out, biases, strict=True)]
        one = out[0] if shape.M == 1 else out[0] * jax.nn.sigmoid(out[0]) * out[1]
        place = program.ref["out"].at[pl.ds(b, 1), :]
        one = (one + residuals[b]).astype(place.dtype)
        pltriton.store(place, one, mask=_is_f(program)[None])


def _addends(program: Program) -> tuple[list[Any], list[Any]]:
    """Bias of each weight and residual of each row, [1 tile_F] or 0. They come last, but are asked
    for first, to be there by then."""

    def read(name: str, n: int) -> list[Any]:
        if name not in program.ref:
            return [0.0] * n
        return [_wide(program.ref[name], (pl.ds(i, 1), slice(None)), is_f) for i in range(n)]

    is_f = _is_f(program)[None]
    return read("bias", program.shape.M), read("residual", program.shape.B)


def _sums(program: Program) -> tuple[list[list[Array]], list[Array]]:
    """Of each weight and row the sums [1 tile_F], and of each row the sum of squares [1].

    What a thread loads at once it adds up at once; only the end crosses threads. All loads of the
    weight must be under way before the first is waited for; but ptxas (of CUDA 13) moves loads down
    to where they are used, to save registers. None crosses a barrier.
    """
    ref, (M, B, _, D) = program.ref, program.shape
    tile_F, tile_D = program.config.tile_F, program.config.tile_D
    lanes = tile_D * ref["x"].dtype.itemsize // 16  # threads that hold a row, at 16 bytes each

    def turn(index: Any, carry: Any) -> Any:
        sums, squares = carry
        start = index * tile_D
        is_d = start + jnp.arange(tile_D) < program.end
        weights = [_weight(program, m, start, is_d) for m in range(M)]
        if not program.interpret:
            pltriton.debug_barrier()
        across = pl.ds(start, tile_D)
        rows = [_wide(ref["x"], (pl.ds(b, 1), across), is_d[None]) for b in range(B)]
        if "scale" in ref:
            scale = _wide(ref["scale"], (across,), is_d)[None]
            squares = [s + (x * x).sum(axis=1) for s, x in zip(squares, rows, strict=True)]
            rows = [x * scale for x in rows]
        wide = [w.astype(jnp.float32) for w in weights]
        sums = [
            [sums[m][b] + _add_up(wide[m] * rows[b], lanes) for b in range(B)] for m in range(M)
        ]
        return sums, squares

    zeros = jnp.zeros((tile_F, lanes), jnp.float32)
    carry = [[zeros] * B for _ in range(M)], [jnp.zeros(1, jnp.float32)] * B
    turns = pl.cdiv(D, tile_D)
    sums, squares = turn(0, carry) if turns == 1 else lax.fori_loop(0, turns, turn, carry)
    return [[s.sum(axis=1)[None] for s in of_weight] for of_weight in sums], squares


def _add_up(x: Array, lanes: int) -> Array:
    """[n tile_D] -> [n lanes]: the sums of neighbours, which one thread holds."""
    return x.reshape(x.shape[0], lanes, -1).sum(axis=2)


def _weight(program: Program, m: int, start: Any, is_d: Array) -> Array:
    tile_F, tile_D = program.config.tile_F, program.config.tile_D
    mask = is_d[None] & (_is_f(program)[:, None] if program.shape.F % tile_F else True)
    place = program.ref["weight"].at[pl.ds(m, 1), :, pl.ds(start, tile_D)]
    return pltriton.load(place, mask=mask[None], other=0)[0]


def _wide(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    return pltriton.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _is_f(program: Program) -> Array:
    tile_F = program.config.tile_F
    return program.index * tile_F + jnp.arange(tile_F) < program.shape.F
