"""Causal attention of rows of several query tokens to their paged K and V: prompts, for GPUs
without Hopper's copy engine and warpgroups.

    out[t, n] = sum_s w[s] v[s] / sum_s w[s],   w[s] = exp(scale q[t, n] . k[s] - peak),  s <= t

The flat query tokens are cut into blocks where they lie, whatever rows they are of, so that the
grid depends on their number alone and no two programs write the same place. A program takes one
block and one query head and walks over the rows of its block, and over each row's tokens up to the
last that the block sees: `4 H` operations per pair of tokens, `4 itemsize H` bytes per token of
context and block, mostly from the GPU's own cache, where the heads of a group meet. Masks are
needed only where a step crosses the diagonal or a block holds several rows.

Sources: Dao 2023, "FlashAttention-2", arXiv:2307.08691; paged cache, Kwon et al. 2023,
arXiv:2309.06180. It is compared with `paged_attention`, which shares nothing with it.
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    block: int = 128  # query tokens of a program
    step: int = 64  # tokens of a row at a time
    num_warps: int = 8
    num_stages: int = 3  # steps in flight


class Plan(NamedTuple):
    """What the blocks walk over: the rows of two tokens or more, numbered without gaps."""

    rows: Int[Array, "B 4"]  # row, first query token, one past the last, position less token
    spans: Int[Array, "blocks 2"]  # the first row of each block, and one past the last


def ragged_extend(
    q: Float[Array, "T N H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    min_query_len: int = 1,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attention of each row's last `query_len` tokens to its `kv_len` cached ones, own included.

    A token sees the positions of its row up to its own, with a `window` the last `window` of them.
    Rows of less than `min_query_len` query tokens are skipped: what they and padding get is finite
    and nothing else. Whatever else the cache holds, NaN included, has no effect. Products
    are of `q`'s dtype, scores and sums float32.
    """
    (T, N, H), K, page_size = q.shape, cache.shape[2], cache.shape[3]
    config = default_config(H, q.dtype) if config is None else config
    plan = plan_blocks(query_starts, query_lens, kv_lens, T, config.block, min_query_len)
    kernel = partial(
        _extend,
        page_size=page_size,
        num_kv_heads=K,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        block=config.block,
        step=config.step,
    )
    return pl.pallas_call(
        kernel,
        grid=(N, len(plan.spans)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name="ragged_extend",
    )(plan.rows, plan.spans, page_table, q, cache.reshape(-1, H))


def default_config(H: int, dtype: Any) -> Config:
    """What fits registers and shared memory."""
    if dtype == jnp.float32:
        return Config(block=32, step=16, num_stages=2)
    if H > 128:
        return Config(block=64, num_stages=2)
    return Config()


def plan_blocks(
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    T: int,
    block: int,
    min_query_len: int,
) -> Plan:
    """The same in every layer, so that it is computed once."""
    B = len(query_lens)
    ends = query_starts + query_lens
    rows = jnp.stack([jnp.arange(B, dtype=jnp.int32), query_starts, ends, kv_lens - ends], axis=1)
    extends = query_lens >= min_query_len
    place = jnp.where(extends, jnp.cumsum(extends) - 1, B)
    rows = jnp.full_like(rows, T).at[place].set(rows, mode="drop", unique_indices=True)
    begin = jnp.arange(0, T, block, dtype=jnp.int32)[:, None]
    first = jnp.sum(rows[:, 2][None, :] <= begin, axis=1)
    last = jnp.sum(rows[:, 1][None, :] < jnp.minimum(begin + block, T), axis=1)
    return Plan(rows, jnp.stack([first, last], axis=1).astype(jnp.int32))


def _extend(
    rows_ref: Any,
    spans_ref: Any,
    table_ref: Any,
    q_ref: Any,
    cache_ref: Any,
    out_ref: Any,
    *,
    page_size: int,
    num_kv_heads: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    block: int,
    step: int,
) -> None:
    """One block of tokens for one query head. Longer than a screen: a kernel is one thought."""
    (T, N, H), K = q_ref.shape, num_kv_heads
    # The last blocks see most: they begin first, so that all end together.
    head, nth = pl.program_id(0), spans_ref.shape[0] - 1 - pl.program_id(1)
    kv_head, begin = head // (N // K), nth * block
    tokens = begin + jnp.arange(block, dtype=jnp.int32)[:, None]
    keys = jnp.arange(step, dtype=jnp.int32)
    lanes = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)[None, :]
    is_real = (tokens < T) & (lanes < H)
    q_place = (tokens, jnp.full_like(tokens, head), lanes)
    q = load_block((q_ref,), q_place, is_real)
    factor = math.log2(math.e) * (scale if soft_cap is None else soft_cap)

    def attend_row(i: Any, sums: Any) -> Any:
        row, row_begin, row_end, shift = (rows_ref[i, j] for j in range(4))
        positions = tokens + shift
        first = jnp.maximum(row_begin, begin) + shift
        last = jnp.minimum(row_end, begin + block) + shift  # one past the last position
        start = first_token(first + 1, window, min(step, page_size))

        def one_step(i: Any, carry: Any, is_masked: bool) -> Any:
            pages, peak, denominator, numerator = carry
            seen_at = start + i * step
            kv_tokens = seen_at + keys
            rows = rows_of_k(pages, kv_tokens, kv_head, K, page_size)[:, None]
            # Nothing past the end is read: it may be NaN, and zero times NaN is NaN.
            mask = jnp.broadcast_to(lanes < H, (step, lanes.size))
            if is_masked:
                mask &= (kv_tokens < last)[:, None]
            k = load_block((cache_ref,), (rows, lanes), mask).astype(q.dtype)
            v = load_block((cache_ref,), (rows + K * page_size, lanes), mask).astype(q.dtype)
            scores = dot(q, k, 1)
            if soft_cap is not None:
                scores = jnp.tanh(scores * (scale / soft_cap))
            scores = scores * factor
            if is_masked:
                seen = (
                    (kv_tokens[None, :] <= positions) & (tokens >= row_begin) & (tokens < row_end)
                )
                if window:
                    seen &= kv_tokens[None, :] > positions - window
                scores = jnp.where(seen, scores, MASKED)
            # A token that has seen nothing yet adds up nonsense, which its first key shrinks to 0.
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            shrink = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - new_peak[:, None])
            numerator = numerator * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)
            denominator = denominator * shrink + weights.sum(axis=1)
            next_pages = pages_at(table_ref, row, seen_at + step, step, page_size)
            return next_pages, new_peak, denominator, numerator

        is_alone = (row_begin <= begin) & (row_end >= begin + block)
        steps = (last - start + step - 1) // step
        # Those that every token of the block sees whole.
        whole = jnp.where(is_alone, (first + 1) // step, 0) if window is None else 0
        carry = pages_at(table_ref, row, start, step, page_size), *sums
        carry = lax.fori_loop(0, whole, partial(one_step, is_masked=False), carry)
        return lax.fori_loop(whole, steps, partial(one_step, is_masked=True), carry)[1:]

    zeros = jnp.zeros(block, jnp.float32)
    sums = zeros + MASKED, zeros, jnp.zeros((block, lanes.size), jnp.float32)
    span = spans_ref[nth, 0], spans_ref[nth, 1]
    _, denominator, numerator = lax.fori_loop(*span, attend_row, sums)
    total = jnp.where(denominator == 0, 1, denominator)[:, None]
    store_block((out_ref,), q_place, is_real, numerator / total)


def unsupported(*, head_size: int, group_size: int, page_size: int, dtype: str) -> str | None:
    """Why these arrays cannot be used; None if they can."""
    del group_size  # any
    return unsupported_arrays(head_size=head_size, page_size=page_size, dtype=dtype)


class Shape(NamedTuple):
    """One call of a production model; rows of equal length."""

    B: int
    N: int
    K: int
    H: int
    query_len: int
    kv_len: int
    page_size: int = 64


SHAPES = {
    f"{model} {B} x {query_len} of {kv_len}": Shape(B, *heads, query_len, kv_len)
    for model, heads in {
        "llama-3.1-8b": (32, 8, 128),
        "qwen2.5-0.5b": (14, 2, 64),
    }.items()
    for B, query_len, kv_len in ((1, 4096, 4096), (4, 1024, 1024), (1, 512, 8192), (32, 128, 128))
}
