"""Attention of the query tokens of a batch, over the paged cache or within the batch alone.
It knows heads and rows; projections, normalisation and rotation are the families'."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.models.interface import Batch, LayerCache
from jaxengine.models.layers import rms_norm
from jaxengine.models.rope import Rotation, rotate
from jaxengine.pallas_kernels import dispatch
from jaxengine.pallas_kernels.dispatch import Kernels
from jaxengine.pallas_kernels.paged_attention import Config, paged_attention, write_kv
from jaxengine.pallas_kernels.rotate_and_write import rotate_and_write


class HeadNorms(NamedTuple):
    """Scales of the root-mean-square normalisation of each query head and each key head."""

    q: Float[Array, " H"]
    k: Float[Array, " H"]
    eps: float


def attend(
    qkv: Float[Array, "T K G2 H"],
    by: Rotation,
    norms: HeadNorms | None,
    cache: LayerCache | None,
    batch: Batch,
    *,
    scale: float,
    window: int | None,
    kernels: Kernels,
) -> tuple[Float[Array, "T N H"], LayerCache | None]:
    """softmax(scale q k') v over the tokens up to each query, its own included; and the new cache.

    `qkv` holds, for each kv head, its G query heads, then k, then v (so `G2` = G + 2), neither
    normed nor rotated yet.
    With a `window`, over the last `window` of those tokens. What padding tokens get is unspecified.
    """
    if cache is None:
        q, k, v = prepare(qkv, by, norms)
        return attend_within(q, k, v, batch, scale=scale, window=window), None
    num_pages, _, _, page_size, _ = cache.shape
    page_ids, offsets = write_pages(batch, num_pages, page_size), batch.positions % page_size
    turn: dict[str, Any] = dict(
        cos=by.cos,
        sin=by.sin,
        page_ids=page_ids,
        offsets=offsets,
        q_norm=norms and norms.q,
        k_norm=norms and norms.k,
        eps=norms.eps if norms else 0.0,
    )
    fused = dispatch.rotate_write_and_decode(kernels)
    if fused is not None and batch.query_starts is None:
        rows = dict(kv_lens=batch.kv_lens, page_table=batch.page_table)
        return fused(qkv, cache, **turn, **rows, scale=scale, window=window)
    if kernels.rotation == "xla":
        q, k, v = prepare(qkv, by, norms)
        cache = write_kv(cache, k, v, page_ids, offsets)
    else:
        turn |= dict(launches_early=kernels.launches_early, interpret=kernels.interpret)
        q, cache = rotate_and_write(qkv, cache, **turn)
    return attend_pages(q, cache, batch, scale=scale, window=window, kernels=kernels), cache


def prepare(
    qkv: Float[Array, "T K G2 H"], by: Rotation, norms: HeadNorms | None
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Queries and keys, normed and rotated, and values."""
    T, H = len(qkv), qkv.shape[3]
    q, k, v = qkv[:, :, :-2].reshape(T, -1, H), qkv[:, :, -2], qkv[:, :, -1]
    if norms is not None:
        q, k = rms_norm(q, norms.q, eps=norms.eps), rms_norm(k, norms.k, eps=norms.eps)
    return rotate(q, by), rotate(k, by), v


def attend_pages(
    q: Float[Array, "T N H"],
    cache: LayerCache,
    batch: Batch,
    *,
    scale: float,
    window: int | None,
    kernels: Kernels,
) -> Float[Array, "T N H"]:
    """Attention to what the pages hold, K and V of the queries' own tokens included.

    A prompt may end in a row of one token, which is a prompt's like any other. But where a batch
    mixes prompts with decoding rows, those are for the kernel made for them: it reads each key once
    for all query heads that share it.
    """
    how: dict[str, Any] = dict(page_table=batch.page_table, scale=scale, window=window)
    decode, extend = dispatch.paged_decode(kernels), dispatch.ragged_extend(kernels)
    starts, lens = batch.query_starts, batch.query_lens
    if decode is not None and starts is None:
        return decode(q, cache, kv_lens=batch.kv_lens, **how)
    if extend is None or starts is None:
        config = Config(max_chunk_tokens=kernels.max_chunk_tokens)
        return paged_attention(q, cache, **_ragged(batch), **how, config=config)
    splits = kernels.splits_single_rows and decode is not None
    out = extend(
        q,
        cache,
        query_starts=starts,
        query_lens=lens,
        kv_lens=batch.kv_lens,
        min_query_len=2 if splits else 1,
        **how,
    )
    if decode is None or not splits:
        return out
    is_single = lens == 1
    kv_lens = jnp.where(is_single, batch.kv_lens, 0)
    singles = decode(q.at[starts].get(mode="clip"), cache, kv_lens=kv_lens, **how)
    # Distinct places, so that it is one write in place: a row that is none goes nowhere.
    nowhere = len(q) + jnp.arange(len(lens), dtype=jnp.int32)
    places = jnp.where(is_single, starts, nowhere)
    return out.at[places].set(singles, mode="drop", unique_indices=True)


def _ragged(batch: Batch) -> dict[str, jax.Array]:
    """What the reference wants to know of a batch."""
    starts = batch.query_starts
    if starts is None:
        starts = jnp.arange(len(batch.query_lens), dtype=jnp.int32)
    return dict(
        rows=batch.rows,
        positions=batch.positions,
        query_starts=starts,
        query_lens=batch.query_lens,
        kv_lens=batch.kv_lens,
    )


def write_pages(batch: Batch, num_pages: int, page_size: int) -> Int[Array, " T"]:
    """The page that each token's K and V go to; for padding, and where they are there already,
    distinct ones that do not exist."""
    num_rows, num_tokens = batch.page_table.shape[0], batch.rows.shape[0]
    pages = batch.page_table.at[batch.rows, batch.positions // page_size].get(mode="clip")
    nowhere = num_pages + jnp.arange(num_tokens, dtype=pages.dtype)
    writes = batch.rows < num_rows
    if batch.write_starts is not None:
        writes &= batch.positions >= batch.write_starts.at[batch.rows].get(mode="clip")
    return jnp.where(writes, pages, nowhere)


def attend_within(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    batch: Batch,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    """Attention among the tokens of the batch, with all T x T scores in memory."""
    distance = batch.positions[:, None] - batch.positions[None]
    visible = (batch.rows[:, None] == batch.rows[None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("kgts,skh->tkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
