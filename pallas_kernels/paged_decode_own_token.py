"""What a block of `paged_decode` does before it reads the context, where queries come as they were
projected: norms and rotation of the queries and of their token's own key, K and V of that token to
their place in the cache, and its score, so that nobody has to read it from there.

    n = x / sqrt(mean x^2 + eps) * scale               of each query and key head, if it has norms
    (first, second) -> (first cos - second sin, second cos + first sin)      of the halves of each

Everything is float32, and rounded once. All of it happens while the first tiles are on their way.

Sources: as of `rotate_and_write`, which does the same as a kernel of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.paged_decode_products import Operations, over_columns, over_rows
from jaxengine.pallas_kernels.paged_decode_segments import Memory, Problem, Segment


class Halves(NamedTuple):
    """Of a head: what is turned with each other."""

    first: jax.Array
    second: jax.Array


class OwnToken(NamedTuple):
    scores: jax.Array  # [C], of each query with its key
    v: jax.Array  # [H]


def prepare(problem: Problem, memory: Memory, operations: Operations, segment: Segment) -> OwnToken:
    """Puts the queries of a segment into `q_tile`, and in the first segment of a row and kv head
    its K and V into the cache, where they have a place there."""
    row, half, G = segment.row, problem.H // 2, problem.G
    # What comes from global memory is asked for before anybody waits.
    by = Halves(*(_wide(operations, ref.at[row]) for ref in (memory.cos, memory.sin)))
    q_norm, k_norm = (
        None if norm is None else _halves(problem, operations, norm)
        for norm in (memory.q_norm, memory.k_norm)
    )
    page, offset = memory.page_ids[row], memory.offsets[row]
    plgpu.barrier_wait(memory.q_full.at[0])
    k = _halves(problem, operations, memory.q_rows.at[G])
    v = operations.load_rows(memory.q_rows.at[G + 1])
    q = _queries(problem, memory, operations)
    plgpu.barrier_arrive(memory.q_free.at[0])

    q, k = _normed_queries(problem, q, q_norm), _normed_key(problem, k, k_norm)
    shape, dtype = (half, problem.C), memory.q_tile.dtype
    q = _turned(q, Halves(*(over_columns(part, shape) for part in by)), dtype)
    k = _turned(k, by, dtype)
    for start, part in zip((0, half), q, strict=True):
        operations.store_transposed(memory.q_tile.at[:, pl.ds(start, half)], part)
    plgpu.commit_smem()
    pl.when((segment.begin == 0) & (page >= 0))(
        lambda: _write(problem, memory, operations, segment.head, page, offset, k, v)
    )
    products = [
        q_part.astype(jnp.float32) * over_columns(k_part.astype(jnp.float32), shape)
        for q_part, k_part in zip(q, k, strict=True)
    ]
    return OwnToken((products[0] + products[1]).sum(axis=0), v.astype(jnp.float32))


def _queries(problem: Problem, memory: Memory, operations: Operations) -> Halves:
    """[half C] each."""
    half, rows = problem.H // 2, memory.q_rows.at[pl.ds(0, problem.C)]
    halves = (rows.at[:, pl.ds(start, half)] for start in (0, half))
    return Halves(*(operations.load_transposed(part).astype(jnp.float32) for part in halves))


def _normed_queries(problem: Problem, q: Halves, norm: Halves | None) -> Halves:
    if norm is None:
        return q
    factor = _factor(problem, q)
    return Halves(
        *(
            part * over_rows(factor, part) * over_columns(scale, part.shape)
            for part, scale in zip(q, norm, strict=True)
        )
    )


def _normed_key(problem: Problem, k: Halves, norm: Halves | None) -> Halves:
    """Its sum is one over the rows of equal columns, for that is how sums are made; and back."""
    if norm is None:
        return k
    columns = Halves(*(over_columns(part, (problem.H // 2, problem.C)) for part in k))
    factor = over_rows(_factor(problem, columns), columns.first).max(axis=1)
    return Halves(*(part * factor * scale for part, scale in zip(k, norm, strict=True)))


def _write(
    problem: Problem,
    memory: Memory,
    operations: Operations,
    head: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    k: Halves,
    v: jax.Array,
) -> None:
    half = problem.H // 2
    of_k, of_v = (
        ((page * 2 + kind) * problem.K + head) * problem.page_size + offset for kind in (0, 1)
    )
    operations.store(memory.new_kv.at[of_k, pl.ds(0, half)], k.first)
    operations.store(memory.new_kv.at[of_k, pl.ds(half, half)], k.second)
    operations.store(memory.new_kv.at[of_v], v)


def _factor(problem: Problem, x: Halves) -> jax.Array:
    """What each column is divided by, inverted."""
    squares = (x.first * x.first + x.second * x.second).sum(axis=0)
    return lax.rsqrt(squares / problem.H + problem.eps)


def _turned(x: Halves, by: Halves, dtype: Any) -> Halves:
    cos, sin = by
    first, second = x.first * cos - x.second * sin, x.second * cos + x.first * sin
    return Halves(first.astype(dtype), second.astype(dtype))


def _halves(problem: Problem, operations: Operations, head: Any) -> Halves:
    half = problem.H // 2
    return Halves(*(_wide(operations, head.at[pl.ds(start, half)]) for start in (0, half)))


def _wide(operations: Operations, ref: Any) -> jax.Array:
    return operations.load_rows(ref).astype(jnp.float32)
