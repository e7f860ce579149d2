"""The warpgroup of a block of `paged_decode` that copies: queries, K and V into shared memory, as
far ahead of their use as there is room; and zeros to rows without tokens, since it has time."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.paged_decode_plan import FIELDS
from jaxengine.pallas_kernels.paged_decode_segments import (
    Memory,
    Problem,
    Segment,
    for_each_segment,
)

NUM_ROWS = FIELDS.index("num_rows")


def copy_all(problem: Problem, memory: Memory) -> None:
    num_segments, num_tiles = for_each_segment(
        problem, memory, partial(_copy_segment, problem, memory)
    )
    if problem.writes_zeros:
        _write_zeros(problem, memory)
    # A block must not end with a barrier that nobody has waited for.
    pl.when(num_segments > 0)(lambda: plgpu.barrier_wait(memory.q_free.at[0]))
    for slot in range(problem.stages):
        pl.when(slot < num_tiles)(partial(plgpu.barrier_wait, memory.kv_free.at[slot]))


def _copy_segment(problem: Problem, memory: Memory, index: jax.Array, segment: Segment) -> None:
    width, K, page_size, tile, box = (
        getattr(problem, name) for name in ("width", "K", "page_size", "tile", "box")
    )
    pl.when(index > 0)(lambda: plgpu.barrier_wait(memory.q_free.at[0]))
    queries = memory.q.at[pl.ds((segment.row * K + segment.head) * width, width)]
    plgpu.copy_gmem_to_smem(queries, memory.q_rows.at[pl.ds(0, width)], memory.q_full.at[0])
    last_page = lax.div(segment.kv_len - 1, page_size)

    def pages_of(t: jax.Array) -> list[jax.Array]:
        tokens = [(segment.first_tile + t) * tile + i for i in range(0, tile, box)]
        pages = [jnp.minimum(lax.div(token, page_size), last_page) for token in tokens]
        return [memory.page_table[segment.row, page] for page in pages]

    def copy_tile(t: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
        next_pages = pages_of(t + 1)  # read now, so that nobody waits for it when it is needed
        step = segment.step + t - segment.begin
        slot = lax.rem(step, problem.stages)
        pl.when(step >= problem.stages)(lambda: plgpu.barrier_wait(memory.kv_free.at[slot]))
        within = lax.rem((segment.first_tile + t) * tile, page_size) if page_size > tile else 0
        kinds = ((memory.k_tiles, memory.k_full), (memory.v_tiles, memory.v_full))
        for kind, (tiles, full) in enumerate(kinds):
            for i, page in enumerate(pages):
                source = ((page * 2 + kind) * K + segment.head) * page_size + within
                target = tiles.at[slot, pl.ds(i * box, box)]
                plgpu.copy_gmem_to_smem(memory.kv.at[pl.ds(source, box)], target, full.at[slot])
        return next_pages

    lax.fori_loop(segment.begin, segment.end, copy_tile, pages_of(segment.begin))


def _write_zeros(problem: Problem, memory: Memory) -> None:
    """The results of rows without tokens: each block sees to every so many rows."""
    width = problem.N * problem.H
    size = math.gcd(width, 1024)  # 8 elements of each thread, where that divides

    block = lax.axis_index("block")
    num_rows = memory.runs[block, NUM_ROWS]

    @pl.loop(0, lax.div(num_rows - block + (problem.blocks - 1), problem.blocks))
    def _(i: jax.Array) -> None:
        row = i * problem.blocks + block

        @pl.when(memory.kv_lens[row] == 0)
        def _() -> None:
            for at in range(0, width, size):
                memory.out[row, pl.ds(at, size)] = jnp.zeros((size,), memory.out.dtype)
