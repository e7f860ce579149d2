"""The producer of `ragged_extend`'s kernel, and what both sides of it know: the shape that is built
for, the memory and barriers of a block, and which tiles the block works on.

The producer copies the queries of each tile and, a step of keys at a time, its pages of K and V
into a ring of slots in shared memory. It fills a slot again when both consumers have let go of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_extend_tiles import ALIGNMENT, Column

M = 64  # query tokens of a consumer: what one tensor core instruction takes
CONSUMERS = 2


class Shape(NamedTuple):
    """All that is known when the kernel is built."""

    N: int
    K: int
    H: int
    page_size: int
    heads: int  # of a tile: 1 or 2
    keys: int
    stages: int
    own_output: bool
    blocks: int
    dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def copied(self) -> int:
        """Keys that one TMA copy brings."""
        return min(self.keys, self.page_size)

    @property
    def score_scale(self) -> float:
        """Turns scores, or their tanh if they are capped, into scores in units of log 2."""
        return (self.scale if self.soft_cap is None else self.soft_cap) * math.log2(math.e)


class Refs(NamedTuple):
    """Arguments and output in global memory, then shared memory, then barriers."""

    tiles: Any  # [tiles, columns]
    num_tiles: Any  # [1]
    num_tokens: Any  # [1]: T
    page_table: Any  # [B P]
    q: Any  # [T N H]
    cache: Any  # [pages * 2 * K * page_size, H]
    out: Any  # [T N H]
    q_smem: Any  # [consumer, M, H]
    out_smem: Any  # [consumer, part of H, M, columns], memory of q_smem unless `own_output`
    k_smem: Any  # [stage, keys, H]
    v_smem: Any  # [stage, keys, H]
    q_full: Any  # barriers: a consumer each
    q_free: Any
    k_full: Any  # a stage each
    k_free: Any
    v_full: Any
    v_free: Any
    turn: Any  # a consumer each


def for_each_tile(
    shape: Shape, refs: Refs, block: jax.Array, work: Callable[..., jax.Array]
) -> jax.Array:
    """Calls work(tile, head, steps so far, is_first), which returns its steps; returns their sum.

    Blocks take tiles in turn, forth and back, so that none gets the longest of every round.
    """
    groups = shape.N // shape.heads
    total = refs.num_tiles[0] * groups
    rounds, rest = lax.div(total, shape.blocks), lax.rem(total, shape.blocks)

    def place(turn: jax.Array) -> jax.Array:
        return jnp.where(lax.rem(turn, 2) == 0, block, shape.blocks - 1 - block)

    def step(turn: jax.Array, steps: jax.Array) -> jax.Array:
        item = turn * shape.blocks + place(turn)
        head = lax.rem(item, groups) * shape.heads
        return steps + work(lax.div(item, groups), head, steps, turn == 0)

    rounds = rounds + jnp.where(place(rounds) < rest, 1, 0)
    return lax.fori_loop(jnp.int32(0), rounds, step, jnp.int32(0))


def produce_all(shape: Shape, refs: Refs, block: jax.Array) -> None:
    steps = for_each_tile(shape, refs, block, lambda *args: produce(shape, refs, *args))

    @pl.when(steps > 0)
    def _() -> None:  # every barrier's last phase is seen, which interpreters insist on
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(refs.q_free.at[consumer])

    def drain(steps: jax.Array, _: None) -> None:
        for free in (refs.k_free, refs.v_free):
            plgpu.barrier_wait(free.at[lax.rem(steps, shape.stages)])

    lax.fori_loop(jnp.maximum(steps - shape.stages, 0), steps, drain, None)


def produce(
    shape: Shape,
    refs: Refs,
    tile: jax.Array,
    head: jax.Array,
    steps: jax.Array,
    is_first: jax.Array,
) -> jax.Array:
    """Copies queries, keys and values of one tile to shared memory, as slots become free."""
    first, end = refs.tiles[tile, Column.FIRST_STEP], refs.tiles[tile, Column.END_STEP]
    row, kv_len = refs.tiles[tile, Column.ROW], refs.tiles[tile, Column.KV_LEN]
    last_page = lax.div(jnp.maximum(kv_len - 1, 0), shape.page_size)
    kv_head = lax.div(head, shape.N // shape.K)
    for consumer in range(CONSUMERS):
        base = first_token(shape, refs, refs.tiles[tile, Column.BASE], consumer)
        own_head = head + consumer if shape.heads == 2 else head
        pl.when(~is_first)(lambda c=consumer: plgpu.barrier_wait(refs.q_free.at[c]))
        source = refs.q.at[pl.ds(base, M), own_head]
        plgpu.copy_gmem_to_smem(source, refs.q_smem.at[consumer], refs.q_full.at[consumer])

    def copy_step(step: jax.Array, steps: jax.Array) -> jax.Array:
        slot = lax.rem(steps, shape.stages)
        heads = []  # in the pool, of each copy: of K; that of V is K further
        for i in range(0, shape.keys, shape.copied):
            key = step * shape.keys + i
            page = jnp.minimum(lax.div(key, shape.page_size), last_page)
            page = refs.page_table[row, page]
            heads.append((page * (2 * shape.K) + kv_head, lax.rem(key, shape.page_size), i))
        rings = (refs.k_smem, refs.k_full, refs.k_free), (refs.v_smem, refs.v_full, refs.v_free)
        for k_or_v, (ring, full, free) in enumerate(rings):
            pl.when(steps >= shape.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for place, offset, i in heads:
                place = (place + k_or_v * shape.K) * shape.page_size + offset
                source = refs.cache.at[pl.ds(pl.multiple_of(place, shape.copied), shape.copied)]
                target = ring.at[slot, pl.ds(i, shape.copied)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])
        return steps + 1

    return lax.fori_loop(first, end, copy_step, steps) - steps


def first_token(shape: Shape, refs: Refs, base: jax.Array, consumer: Any) -> jax.Array:
    """Of a consumer's M tokens, which all exist."""
    base = base + consumer * (M if shape.heads == 1 else 0)
    return pl.multiple_of(jnp.minimum(base, refs.num_tokens[0] - M), ALIGNMENT)
