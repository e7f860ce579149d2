"""Attention of the query tokens of a batch, over the paged cache or within the batch alone.
It knows heads and rows; projections, normalisation and rotation are the families'."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.models.interface import Batch, LayerCache
from jaxengine.pallas_kernels.paged_attention import paged_attention, write_kv


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: LayerCache | None,
    batch: Batch,
    *,
    scale: float,
    window: int | None,
) -> tuple[Float[Array, "T N H"], LayerCache | None]:
    """softmax(scale q k') v over the tokens up to each query, its own included; and the new cache.

    With a `window`, over the last `window` of those tokens. What padding tokens get is unspecified.
    """
    if cache is None:
        return attend_within(q, k, v, batch, scale=scale, window=window), None
    num_pages, _, _, page_size, _ = cache.shape
    page_ids = write_pages(batch, num_pages, page_size)
    cache = write_kv(cache, k, v, page_ids, batch.positions % page_size)
    out = paged_attention(
        q,
        cache,
        rows=batch.rows,
        positions=batch.positions,
        query_starts=batch.query_starts,
        query_lens=batch.query_lens,
        kv_lens=batch.kv_lens,
        page_table=batch.page_table,
        scale=scale,
        window=window,
    )
    return out, cache


def write_pages(batch: Batch, num_pages: int, page_size: int) -> Int[Array, " T"]:
    """The page that each token's K and V go to; for padding, distinct ones that do not exist."""
    num_rows, num_tokens = batch.page_table.shape[0], batch.rows.shape[0]
    pages = batch.page_table.at[batch.rows, batch.positions // page_size].get(mode="clip")
    nowhere = num_pages + jnp.arange(num_tokens, dtype=pages.dtype)
    return jnp.where(batch.rows < num_rows, pages, nowhere)


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
