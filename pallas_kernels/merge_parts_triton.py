"""Softmax-weighted means of one row, taken over parts of its context, put together.

    out[b, n] = sum_i w[i] numerator[i, n] / sum_i w[i] denominator[i, n],
    w[i] = 2^(peak[i, n] - max_j peak[j, n])

over the parts i of row b. It reads `4 (H + 2)` bytes per part and
head, all of them from the GPU's own cache, and costs a launch. One program does one head of a row.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32, Int

from jaxengine.pallas_kernels.triton_blocks import MASKED, load_block, store_block

BLOCK = 32  # parts at a time


def merge_parts(
    out: Float[Array, "B N H"],
    firsts: Int[Array, " B"],
    counts: Int[Array, " B"],
    peaks: Float32[Array, "I N"],
    denominators: Float32[Array, "I N"],
    numerators: Float32[Array, "I N H"],
    *,
    interpret: bool,
) -> Float[Array, "B N H"]:
    """`out` with the rows of more than one part filled in; it is the same buffer.

    Parts `firsts[b]` to `firsts[b] + counts[b]` are row b's. Peaks are powers of two. Sums are not
    divided yet.
    """
    B, N, _ = out.shape
    return pl.pallas_call(
        _merge,
        grid=(N, B),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_merge",
    )(firsts, counts, peaks, denominators, numerators, out)


def _merge(
    firsts_ref: Any,
    counts_ref: Any,
    peaks_ref: Any,
    denominators_ref: Any,
    numerators_ref: Any,
    _: Any,
    out_ref: Any,
) -> None:
    head, row, H = pl.program_id(0), pl.program_id(1), out_ref.shape[2]
    first, count = firsts_ref[row], counts_ref[row]
    lanes = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)

    def one_block(i: Any, carry: Any) -> Any:
        peak, denominator, numerator = carry
        place = i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        mask, items = place < count, first + place
        heads = jnp.full_like(items, head)
        peaks = load_block((peaks_ref,), (items, heads), mask, MASKED)
        denominators = load_block((denominators_ref,), (items, heads), mask)
        index = items[:, None], heads[:, None], lanes[None, :]
        numerators = load_block((numerators_ref,), index, mask[:, None] & (lanes < H)[None, :])
        new_peak = jnp.maximum(peak, peaks.max())
        shrink, weights = jnp.exp2(peak - new_peak), jnp.exp2(peaks - new_peak)
        denominator = denominator * shrink + (denominators * weights).sum()
        return new_peak, denominator, numerator * shrink + (numerators * weights[:, None]).sum(0)

    @pl.when(count > 1)
    def _() -> None:
        sums = jnp.float32(MASKED), jnp.float32(0), jnp.zeros(lanes.shape, jnp.float32)
        blocks = (count + BLOCK - 1) // BLOCK
        _, denominator, numerator = lax.fori_loop(0, blocks, one_block, sums)
        store_block((out_ref, row, head), (lanes,), lanes < H, numerator / denominator)
