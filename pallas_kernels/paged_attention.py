"""Attention over a paged KV cache in plain XLA: what a CPU runs, what a GPU without a kernel runs,
and what kernels are compared with. It knows neither models nor requests.

The query tokens of each row are cut into blocks of one fixed size. A loop walks over the context, a
chunk of pages at a time, and each block attends to its own pages of that chunk; the loop runs from
the first chunk to the last that any block sees. Memory is bounded by one chunk, work by the lengths
at run time. Chunks begin at absolute positions, and one that a block does not see leaves its sums
as they are to the last bit, so that no row depends on its neighbours.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; paged cache, Kwon et al.
2023, arXiv:2309.06180.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
NEVER = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    max_block_queries: int = 128
    min_chunk_tokens: int = 128
    max_chunk_tokens: int = 256
    max_gathered: int = (
        2**16
    )  # tokens of all blocks a chunk: 268 MB of bf16 K and V at 8 heads of 128
    max_scores: int = 2**21  # of all blocks a chunk and query head: 268 MB of float32 at 32 heads


class Blocks(NamedTuple):
    """`NB` blocks of `Q` query tokens, each of one row. A slot without a token sees nothing."""

    rows: Int[Array, " NB"]
    tokens: Int[Array, "NB Q"]  # index in T
    starts: Int[Array, "NB Q"]  # first position that the token sees; NEVER where there is no token
    ends: Int[Array, "NB Q"]  # one past the last that it sees; 0 where there is no token


class Sums(NamedTuple):
    """A softmax-weighted mean of V over the chunks so far, not yet divided."""

    peak: Float32[Array, "NB K Q G"]  # largest score
    denominator: Float32[Array, "NB K Q G"]
    numerator: Float32[Array, "NB K Q G H"]


def write_kv(
    cache: Float[Array, "pages 2 K page_size H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> Float[Array, "pages 2 K page_size H"]:
    """The cache with K and V of each token in its place; the same buffer if the cache is donated.

    A token whose page id is `pages` or more is dropped. The places written must differ. A negative
    id would wrap round to the last pages: never pass one.
    """
    kv = jnp.stack([k, v], axis=1).astype(cache.dtype)
    return cache.at[page_ids, :, :, offsets].set(kv, mode="drop", unique_indices=True)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    config: Config = Config(),  # noqa: B008  frozen
) -> Float[Array, "T N H"]:
    """Causal attention of ragged query tokens to the cached K and V of their rows, own included.

    A token sees the positions `p` of its row with `p <= position`, `p < kv_len` and, given a
    window, `p > position - window`. Padding (`rows == B`) gives zeros. Whatever else the cache
    holds, NaN included, has no effect. Products are of `q`'s dtype, scores and sums float32.
    """
    T, N, H = q.shape
    K, page_size = cache.shape[2:4]
    Q, NB = block_shape(T, page_table.shape[0], config)
    blocks = cut_into_blocks(positions, query_starts, query_lens, kv_lens, Q, NB, window)
    chunk_pages = pages_per_chunk(Q, NB, page_size, config)
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % chunk_pages)))
    block_q = q.at[blocks.tokens].get(mode="clip").reshape(NB, Q, K, N // K, H)
    # NB K Q G H, so that one product serves all queries of a kv head
    block_q = block_q.transpose(0, 2, 1, 3, 4)

    def attend(chunk: Int[Array, ""], sums: Sums) -> Sums:
        kv_positions = (chunk * chunk_pages * page_size) + jnp.arange(chunk_pages * page_size)
        page_ids = lax.dynamic_slice_in_dim(page_table, chunk * chunk_pages, chunk_pages, axis=1)
        k, v = gather_chunk(cache, page_ids, blocks, kv_positions)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        return accumulate(sums, block_q, k, v, is_visible(blocks, kv_positions), scale)

    sums = for_each_chunk(blocks, chunk_pages * page_size, attend, no_sums(NB, K, Q, N // K, H))
    out = divide(sums).astype(q.dtype)
    return take_tokens(out, rows, query_starts, query_lens)


def block_shape(T: int, B: int, config: Config) -> tuple[int, int]:
    """Query tokens of a block, and the blocks that suffice however `T` tokens fall into `B` rows.

    A block is as long as the average row, so that at most half of all slots are without a token.
    """
    Q = min(config.max_block_queries, max(1, T // B))
    Q = 1 << (Q.bit_length() - 1)
    return Q, (T + min(B, T) * (Q - 1)) // Q


def pages_per_chunk(Q: int, NB: int, page_size: int, config: Config) -> int:
    tokens = min(config.max_gathered // NB, config.max_scores // (NB * Q), config.max_chunk_tokens)
    return max(1, max(tokens, config.min_chunk_tokens) // page_size)


def cut_into_blocks(
    positions: Int[Array, " T"],
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    Q: int,
    NB: int,
    window: int | None,
) -> Blocks:
    block_ends = jnp.cumsum(-(-query_lens // Q))
    blocks = jnp.arange(NB, dtype=jnp.int32)
    # All at once: the default binary search would be a loop of its own, once in every layer.
    rows = jnp.searchsorted(block_ends, blocks, side="right", method="compare_all")
    rows = jnp.minimum(rows.astype(jnp.int32), len(query_lens) - 1)
    first = (blocks - (block_ends - -(-query_lens // Q))[rows]) * Q
    in_row = first[:, None] + jnp.arange(Q, dtype=jnp.int32)[None, :]
    tokens = query_starts[rows][:, None] + in_row
    has_token = in_row < query_lens[rows][:, None]
    position = positions.at[tokens].get(mode="clip")
    ends = jnp.minimum(position + 1, kv_lens[rows][:, None])
    starts = jnp.zeros_like(ends) if window is None else jnp.maximum(position + 1 - window, 0)
    return Blocks(rows, tokens, jnp.where(has_token, starts, NEVER), jnp.where(has_token, ends, 0))


def for_each_chunk(
    blocks: Blocks, chunk_tokens: int, attend: Callable[[Array, Sums], Sums], sums: Sums
) -> Sums:
    """`sums` after every chunk that some block sees part of."""
    first = jnp.min(blocks.starts) // chunk_tokens
    last = -(-jnp.max(blocks.ends) // chunk_tokens)
    return lax.fori_loop(first, last, attend, sums)


def gather_chunk(
    cache: Float[Array, "pages 2 K page_size H"],
    page_ids: Int[Array, "B C"],
    blocks: Blocks,
    kv_positions: Int[Array, " S"],
) -> tuple[Float[Array, "NB K S H"], Float[Array, "NB K S H"]]:
    """K and V of each block for one chunk of pages, V zero where no token of the block sees it."""
    NB, C, S = len(blocks.rows), page_ids.shape[1], len(kv_positions)
    starts, ends = jnp.min(blocks.starts, axis=1), jnp.max(blocks.ends, axis=1)
    seen = (kv_positions[None, :] >= starts[:, None]) & (kv_positions[None, :] < ends[:, None])
    # A page that the block does not see is read as page 0, which the GPU's own cache then holds.
    page_ids = jnp.where(seen.reshape(NB, C, -1).any(axis=2), page_ids[blocks.rows], 0)

    def gather(k_or_v: int) -> Array:
        pages = cache.at[page_ids, k_or_v].get(mode="clip")  # NB C K page_size H
        return pages.transpose(0, 2, 1, 3, 4).reshape(NB, cache.shape[2], S, cache.shape[4])

    # Its weight is zero there, but zero times NaN is NaN.
    return gather(0), jnp.where(seen[:, None, :, None], gather(1), 0)


def is_visible(blocks: Blocks, kv_positions: Int[Array, " S"]) -> Bool[Array, "NB Q S"]:
    kv_positions = kv_positions[None, None, :]
    return (kv_positions >= blocks.starts[:, :, None]) & (kv_positions < blocks.ends[:, :, None])


def no_sums(NB: int, K: int, Q: int, G: int, H: int) -> Sums:
    zeros = jnp.zeros((NB, K, Q, G), jnp.float32)
    return Sums(zeros + MASKED, zeros, jnp.zeros((NB, K, Q, G, H), jnp.float32))


def accumulate(
    sums: Sums,
    q: Float[Array, "NB K Q G H"],
    k: Float[Array, "NB K S H"],
    v: Float[Array, "NB K S H"],
    visible: Bool[Array, "NB Q S"],
    scale: float,
) -> Sums:
    """The sums with one more chunk in them."""
    visible = visible[:, None, :, None, :]
    scores = jnp.einsum("bkqgh,bksh->bkqgs", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible, scores, MASKED)
    peak = jnp.maximum(sums.peak, scores.max(axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - peak[..., None]), 0)
    shrink = jnp.exp(sums.peak - peak)
    values = jnp.einsum(
        "bkqgs,bksh->bkqgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return Sums(
        peak,
        sums.denominator * shrink + weights.sum(axis=-1),
        sums.numerator * shrink[..., None] + values,
    )


def divide(sums: Sums) -> Float32[Array, "NB K Q G H"]:
    """The weighted mean; zeros where nothing was seen."""
    return sums.numerator / jnp.where(sums.denominator == 0, 1, sums.denominator)[..., None]


def take_tokens(
    out: Float[Array, "NB K Q G H"],
    rows: Int[Array, " T"],
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
) -> Float[Array, "T N H"]:
    """The blocks' results flat again, in the order of the tokens; zeros for padding."""
    NB, K, Q, G, H = out.shape
    B, row = len(query_lens), jnp.minimum(rows, len(query_lens) - 1)
    num_blocks = -(-query_lens // Q)
    in_row = jnp.arange(len(rows), dtype=jnp.int32) - query_starts[row]
    block = (jnp.cumsum(num_blocks) - num_blocks)[row] + in_row // Q
    out = out.transpose(0, 2, 1, 3, 4).reshape(NB * Q, K * G, H)
    out = out.at[block * Q + in_row % Q].get(mode="clip")
    return jnp.where((rows < B)[:, None, None], out, 0)
