"""What makes logits log-probabilities, and the likeliest token, without the logits ever being in
memory; on Hopper's tensor cores.

    norm[t] = log sum_v exp(logits[t, v]), peak[t] = max_v logits[t, v] = logits[t, best[t]]
    logits[t, v] = sum_d head[v, d] hidden[t, d]

Logits are float32. Time is that of their product, 2 T V D operations: 3.5 ms for 8192 tokens of
Qwen3-0.6B at 730 TFLOP/s; 3.8 are taken on an H200, and 11.4 for Llama-3.1-8B (11.8). Where logits
are written and read again, block by block, it is 7.5 and 16, with the likeliest 9.2 and 18. Of rows
beyond those that count there is no product, so that the time is in proportion to the tokens that
somebody asks about.

Each tile of the product leaves a peak, a sum and a place for each of its tokens, 12 bytes for the
logits of 256; from these XLA makes the results.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; losses without logits,
Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", arXiv:2411.09009.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.many_row_kernel import (
    BLOCK_ROWS,
    CONSUMERS,
    ROWS,
    Block,
    Config,
    Tile,
    many_row_kernel,
    num_output_tiles,
)
from jaxengine.pallas_kernels.mosaic import BLOCKS
from jaxengine.pallas_kernels.ragged_extend_products import COLUMNS, over

CONFIG = Config(tile_F=256, num_blocks=BLOCKS, stages=4)
MASKED = -1e30  # finite: the difference of two masked logits must not be NaN
FIELDS = 3  # of a token in a tile: peak, sum of weights relative to it, its place in the tile


class Normalizer(NamedTuple):
    """Of the logits of some tokens."""

    norm: Float32[Array, " T"]
    peak: Float32[Array, " T"]
    best: Int32[Array, " T"]  # the first token whose logit is the peak


def reference(hidden: Float[Array, "T D"], head: Float[Array, "V D"]) -> Normalizer:
    """The same in plain XLA, with all logits in memory."""
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    best = jnp.argmax(logits, axis=1).astype(jnp.int32)
    return Normalizer(jax.nn.logsumexp(logits, axis=1), logits.max(axis=1), best)


def log_normalizer(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    *,
    num_rows: Int[Array, ""],
    config: Config = CONFIG,
    interpret: bool = False,
) -> Normalizer:
    """Of the first `num_rows` tokens; of others there are some numbers.

    Raises:
        ValueError: shapes or a dtype that the kernel is not made for.
    """
    (T, D), V, width = hidden.shape, len(head), config.tile_F
    shape = Shape(1, T, V, D)
    if reason := unsupported(T=T, V=V, D=D, dtype=hidden.dtype, config=config):
        raise ValueError(f"log_normalizer: {reason}")
    tiles = num_output_tiles(shape, config)
    results = (jax.ShapeDtypeStruct((tiles, FIELDS, T), jnp.float32),)
    call = lowered_once(_kernel, shape, config, results=results, interpret=interpret)
    (parts,) = call(hidden, head, num_rows.astype(jnp.int32)[None])
    peaks, sums, places = (parts[:, field] for field in range(FIELDS))
    peak = peaks.max(axis=0)
    norm = peak + jnp.log((sums * jnp.exp(peaks - peak[None])).sum(axis=0))
    tile = peaks.argmax(axis=0)
    place = jnp.take_along_axis(places, tile[None], axis=0)[0]
    best = jnp.minimum(tile * width, V - width) + place.astype(jnp.int32)
    return Normalizer(norm, peak, best.astype(jnp.int32))


def _kernel(
    shape: Shape, config: Config, results: tuple[jax.ShapeDtypeStruct], interpret: bool
) -> Callable[..., tuple[jax.Array]]:
    """The call (hidden, head, number of rows [1]) -> [tiles FIELDS T]."""
    return many_row_kernel(
        shape,
        config,
        _finish,
        plgpu.SMEM((CONSUMERS, FIELDS, ROWS), jnp.float32),
        counts_rows=True,
        results=results,
        interpret=interpret,
    )


def _finish(block: Block, consumer: jax.Array, tile: Tile, sums: jax.Array) -> None:
    memory, tile_F = block.memory, block.config.tile_F
    # Some columns at a time, so that their number is part of an instruction and in no register.
    starts = range(0, tile_F, COLUMNS)
    parts = [sums[:, start : start + COLUMNS] for start in starts]
    if block.shape.F % tile_F:  # the last tile has some of the one before
        num_known = tile.number * tile_F - tile.output
        limits = [jnp.where(start < num_known, MASKED, jnp.inf) for start in starts]
        parts = [jnp.minimum(part, limit) for part, limit in zip(parts, limits, strict=True)]
    peak = reduce(jnp.maximum, parts).max(axis=1)
    peaks = over(peak, parts[0])
    weight = reduce(jnp.add, [jnp.exp(part - peaks) for part in parts]).sum(axis=1)
    column = block.products.iota(parts[0].shape, 1).astype(jnp.float32)
    found = [
        jnp.where(part == peaks, -float(start), -float(tile_F))
        for start, part in zip(starts, parts, strict=True)
    ]
    after = reduce(jnp.maximum, found) - column
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the tile before
    for field, values in enumerate((peak, weight, -after.max(axis=1))):
        memory.out_tiles[consumer, field] = values
    plgpu.commit_smem()
    target = memory.out.at[tile.number, :, pl.ds(tile.row + consumer * ROWS, ROWS)]
    plgpu.copy_smem_to_gmem(memory.out_tiles.at[consumer], target)


def unsupported(*, T: int, V: int, D: int, dtype: Any, config: Config = CONFIG) -> str | None:
    """Why the kernel cannot be used; None where it can."""
    if T % BLOCK_ROWS or not T:
        return f"it takes multiples of {BLOCK_ROWS} tokens, not {T}"
    if V % 8 or V < config.tile_F or D % 64:
        return f"it has no tiles for {V} logits of {D} inputs"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    return None


SHAPES = {  # (V, D) of the head
    "qwen3-0.6b": (151936, 1024),
    "qwen2.5-0.5b": (151936, 896),
    "llama-3.2-1b": (128256, 2048),
    "llama-3.1-8b": (128256, 4096),
}
