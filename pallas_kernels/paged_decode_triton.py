"""Attention of one query token per row over its paged K and V: decoding, for GPUs without Hopper's
copy engine.

    out[b, n] = sum_s w[s] v[s] / sum_s w[s],    w[s] = exp(scale q[b, n] . k[s] - peak)

It reads `2 * itemsize * K * H` bytes per token of context and does `2 G` operations per byte of
bfloat16, so memory is its limit: all `G` query heads of a kv head share one read.

Rows are cut into parts, so that a few long rows fill the chip and many uneven ones end together.
The parts are chosen from the lengths at run time, at most one more per row than fill the chip once,
so that the grid is as static as the shapes. One program does one part for one kv head; a row of one
part is done with that, the others are merged by a second kernel. The list of parts depends on
lengths alone: in a model it is made once, not once a layer.

Sources: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; parts of the context in
parallel, Dao et al. 2023, "Flash-Decoding for long-context inference"; paged cache, Kwon et al.
2023, arXiv:2309.06180. It is compared with `paged_attention`, which shares nothing with it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.merge_parts_triton import merge_parts
from jaxengine.pallas_kernels.triton_blocks import (
    MASKED,
    dot,
    first_token,
    load_block,
    pages_at,
    rows_of_k,
    store_block,
    unsupported_arrays,
)

DOT_ROWS = 16  # of the smallest product of tensor cores; query heads are padded to it


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    step: int = 64  # tokens of a row at a time
    num_warps: int = 4
    num_stages: int = 3  # steps in flight
    programs: int = 528  # parts times kv heads that fill a chip: 4 for each of 132 cores
    min_part: int = 128  # tokens; less is not worth a program
    max_whole: int = 512  # tokens; a row that short is never cut


class Parts(NamedTuple):
    """What each program does: `I` pieces of rows, those of a row side by side."""

    items: Int[Array, "I 4"]  # row, first token, one past the last (-1: no work), parts of the row
    firsts: Int[Array, " B"]  # the row's first part
    counts: Int[Array, " B"]  # its parts, at least one


def paged_decode(
    q: Float[Array, "B N H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of the last token of each row to its `kv_len` cached tokens, itself included.

    With a `window`, to the last `window` of them; with a `soft_cap`, scores are
    `soft_cap * tanh(score / soft_cap)`. A row of length 0 gives zeros. Whatever else the cache
    holds, NaN included, has no effect. Products are of `q`'s dtype, scores and sums float32.
    """
    config = default_config(q.shape[2], q.dtype) if config is None else config
    (B, N, H), K, page_size = q.shape, cache.shape[2], cache.shape[3]
    max_len = page_table.shape[1] * page_size
    parts = None
    if max_len > config.max_whole * max(1, B * K // config.programs):
        parts = cut_into_parts(
            kv_lens, max_len, page_size=page_size, num_kv_heads=K, window=window, config=config
        )
    num_items, items = (B, ()) if parts is None else (len(parts.items), (parts.items,))
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if parts is not None:
        results += [jax.ShapeDtypeStruct((num_items, N), jnp.float32)] * 2
        results += [jax.ShapeDtypeStruct((num_items, N, H), jnp.float32)]
    kernel = partial(
        _attend,
        page_size=page_size,
        group=N // K,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        step=config.step,
    )
    out, *partial_sums = pl.pallas_call(
        kernel,
        grid=(K, num_items),
        out_shape=results,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name="paged_decode",
    )(*items, kv_lens, page_table, q, cache.reshape(-1, H))
    if parts is None:
        return out
    return merge_parts(out, parts.firsts, parts.counts, *partial_sums, interpret=interpret)


def default_config(H: int, dtype: Any) -> Config:
    """What fits registers, and shared memory three times."""
    if dtype == jnp.float32:
        return Config(step=32, num_stages=2)
    return Config(step=32) if H > 128 else Config()


def cut_into_parts(
    kv_lens: Int[Array, " B"],
    max_len: int,
    *,
    page_size: int,
    num_kv_heads: int,
    window: int | None,
    config: Config,
) -> Parts:
    """Parts of about equal length, whole rows if they are short; an empty one for length 0."""
    B, step = len(kv_lens), config.step
    begins = first_token(kv_lens, window, min(step, page_size))
    lens = kv_lens - begins
    fill = max(1, config.programs // num_kv_heads)  # parts that fill the chip
    longest = jnp.maximum(-(-jnp.sum(lens) // fill), config.min_part)
    counts = jnp.where(lens <= config.max_whole, 1, -(-lens // longest))
    part_lens = jnp.maximum(-(-lens // (counts * step)) * step, step)
    counts = jnp.maximum(-(-lens // part_lens), 1)
    ends = jnp.cumsum(counts)
    index = jnp.arange(B + min(fill, B * (max_len // config.min_part)), dtype=jnp.int32)
    # All at once: the default, a binary search, would be a loop.
    rows = jnp.searchsorted(ends, index, side="right", method="compare_all")
    is_used, rows = rows < B, jnp.minimum(rows.astype(jnp.int32), B - 1)
    starts = begins[rows] + (index - (ends - counts)[rows]) * part_lens[rows]
    stops = jnp.minimum(starts + part_lens[rows], kv_lens[rows])
    items = jnp.stack([rows, starts, jnp.where(is_used, stops, -1), counts[rows]], axis=1)
    return Parts(items, ends - counts, counts)


def _attend(
    *refs: Any,
    page_size: int,
    group: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    step: int,
) -> None:
    """One part of one row for one kv head. Longer than a screen: a kernel is one thought."""
    kv_head, item = pl.program_id(0), pl.program_id(1)
    part_refs: Any = refs[6:]
    if not part_refs:  # rows are whole
        kv_lens_ref, table_ref, q_ref, cache_ref, out_ref = refs
        row, count, kv_len = item, 1, kv_lens_ref[item]
        start, stop = first_token(kv_len, window, min(step, page_size)), kv_len
    else:
        items_ref, kv_lens_ref, table_ref, q_ref, cache_ref, out_ref = refs[:6]
        row, start, stop, count = (items_ref[item, i] for i in range(4))
        kv_len = kv_lens_ref[row] if window else stop
    H, K = q_ref.shape[2], q_ref.shape[1] // group
    keys = jnp.arange(step, dtype=jnp.int32)
    group_heads = jnp.arange(DOT_ROWS, dtype=jnp.int32)[:, None]
    heads = kv_head * group + group_heads
    lanes = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)[None, :]
    is_real = (group_heads < group) & (lanes < H)

    def attend() -> None:
        q = load_block((q_ref, row), (heads, lanes), is_real)

        def one_step(i: Any, carry: Any) -> Any:
            pages, peak, denominator, numerator = carry
            position = start + i * step
            tokens = position + keys
            rows = rows_of_k(pages, tokens, kv_head, K, page_size)[:, None]
            # Nothing past the end is read: it may be NaN, and zero times NaN is NaN.
            mask = (tokens < stop)[:, None] & (lanes < H)
            k = load_block((cache_ref,), (rows, lanes), mask).astype(q.dtype)
            v = load_block((cache_ref,), (rows + K * page_size, lanes), mask).astype(q.dtype)
            scores = dot(q, k, 1) * (scale if soft_cap is None else scale / soft_cap)
            if soft_cap is not None:
                scores = jnp.tanh(scores) * soft_cap
            seen = tokens < stop
            if window:
                seen &= tokens >= kv_len - window
            scores = jnp.where(seen[None, :], scores * math.log2(math.e), MASKED)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            shrink = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - new_peak[:, None])
            numerator = numerator * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)
            denominator = denominator * shrink + weights.sum(axis=1)
            # The next step's pages are known before it begins, so that no copy waits for them.
            next_pages = pages_at(table_ref, row, position + step, step, page_size)
            return next_pages, new_peak, denominator, numerator

        zeros = jnp.zeros(DOT_ROWS, jnp.float32)
        sums = zeros + MASKED, zeros, jnp.zeros((DOT_ROWS, lanes.size), jnp.float32)
        steps = (stop - start + step - 1) // step
        pages = pages_at(table_ref, row, start, step, page_size)
        _, peak, denominator, numerator = lax.fori_loop(0, steps, one_step, (pages, *sums))

        total = jnp.where(denominator == 0, 1, denominator)[:, None]

        def store_whole() -> None:
            store_block((out_ref, row), (heads, lanes), is_real, numerator / total)

        def store_part() -> None:
            peaks_ref, denominators_ref, numerators_ref = part_refs
            flat, mask = heads[:, 0], group_heads[:, 0] < group
            store_block((peaks_ref, item), (flat,), mask, peak)
            store_block((denominators_ref, item), (flat,), mask, denominator)
            store_block((numerators_ref, item), (heads, lanes), is_real, numerator)

        if part_refs:
            pl.when(count == 1)(store_whole)
            pl.when(count > 1)(store_part)
        else:
            store_whole()

    if part_refs:
        pl.when(stop >= 0)(attend)
    else:
        attend()


def unsupported(*, head_size: int, group_size: int, page_size: int, dtype: str) -> str | None:
    """Why these arrays cannot be used; None if they can."""
    if group_size > DOT_ROWS:
        return f"it takes up to {DOT_ROWS} query heads of one kv head, not {group_size}"
    return unsupported_arrays(head_size=head_size, page_size=page_size, dtype=dtype)


class Shape(NamedTuple):
    """One call of a production model; rows of equal length."""

    B: int
    N: int
    K: int
    H: int
    kv_len: int
    page_size: int = 64


SHAPES = {
    f"{model} {B} x {kv_len}": Shape(B, *heads, kv_len)
    for model, heads in {
        "llama-3.1-8b": (32, 8, 128),
        "qwen3-0.6b": (16, 8, 128),
        "qwen2.5-0.5b": (14, 2, 64),
        "qwen3-30b-a3b": (32, 4, 128),
    }.items()
    for B, kv_len in (
        (1, 128),
        (1, 4096),
        (8, 1024),
        (32, 1024),
        (32, 4096),
        (128, 1024),
        (256, 128),
    )
}
