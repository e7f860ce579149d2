"""Attention of every token to all tokens of its row, before and behind it, within a batch that
holds whole rows. It knows flat tokens and their rows, and no cache.

A row is a stretch of neighbours, so the scores of all pairs are never made: tokens are taken by
blocks, and each block looks at as many blocks around it as the longest row of the batch can reach,
one after the other, with the sums of an online softmax.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.models.interface import Batch

BLOCK = 128


class _Sums(NamedTuple):
    """What a block's queries have of the keys seen so far."""

    peak: Float[Array, "blocks N block"]  # largest score
    total: Float[Array, "blocks N block"]  # of exp(score - peak)
    out: Float[Array, "blocks N block H"]  # the values, weighted so


def attend_both_ways(
    qkv: Float[Array, "T 3 N H"], batch: Batch, *, scale: float
) -> Float[Array, "T N H"]:
    """softmax(scale q k') v over all tokens of a query's row, with float32 scores and sums.

    What padding tokens get is unspecified.
    """
    T, _, N, H = qkv.shape
    block = min(BLOCK, T)
    padding = -T % block
    rows = jnp.pad(batch.rows, (0, padding), constant_values=len(batch.query_lens))
    rows = rows.reshape(-1, block)
    blocked = jnp.pad(qkv, ((0, padding), (0, 0), (0, 0), (0, 0))).reshape(-1, block, 3, N, H)
    q, k, v = blocked[:, :, 0], blocked[:, :, 1], blocked[:, :, 2]
    # A weight of zero times what is no number would reach other rows. Of its own row the scores
    # tell.
    v = jnp.where(jnp.isfinite(v), v, 0)
    index = jnp.arange(len(rows), dtype=jnp.int32)

    def visit(shift: Int[Array, ""], sums: _Sums) -> _Sums:
        """Each block the one that stands `shift` behind it."""
        other = index + shift
        exists = (other >= 0) & (other < len(rows))
        there = jnp.where(exists, other, 0)
        visible = (rows[:, :, None] == rows[there][:, None]) & exists[:, None, None]
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k[there], preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None], scores * scale, -jnp.inf)
        return _added(sums, scores, v[there])

    reach = (jnp.max(batch.query_lens) + block - 2) // block  # of a row that begins where one ends
    lowest = jnp.full((len(rows), N, block), jnp.finfo(jnp.float32).min)
    nothing = _Sums(lowest, jnp.zeros_like(lowest), jnp.zeros((*lowest.shape, H)))
    sums = lax.fori_loop(-reach, reach + 1, visit, nothing)
    out = (sums.out / sums.total[..., None]).astype(qkv.dtype)
    return jnp.moveaxis(out, 1, 2).reshape(-1, N, H)[:T]


def _added(
    sums: _Sums,
    scores: Float[Array, "blocks N block keys"],
    v: Float[Array, "blocks keys N H"],
) -> _Sums:
    peak = jnp.maximum(sums.peak, scores.max(axis=3))
    weights = jnp.exp(scores - peak[..., None])
    kept = jnp.exp(sums.peak - peak)
    new = jnp.einsum(
        "bnqk,bknh->bnqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return _Sums(
        peak=peak,
        total=sums.total * kept + weights.sum(axis=3),
        out=sums.out * kept[..., None] + new,
    )
