"""Who does what in decode attention: the context of a batch, cut into equal runs for the blocks of
a grid that never changes, by a few operations on the row lengths alone.

The unit of work is a tile of tokens of one row and one kv head. Units are numbered row by row, head
by head, in order of position, and every block gets one run of them. There are two ways to cut:

- aligned: a run lies within one (row, kv head), its pair. With few pairs no block is wasted on
  crumbs, and pairs that are not cut at all need no merging.
- even: run j is units `[j * size, (j + 1) * size)`, wherever pairs begin. Every block gets as much
  as every other, however uneven the rows; at most one pair a block is cut.

The cheaper way is taken, by the length of the longest run and the cost of merging. A plan depends
on lengths only, not on the layer: made once a step, it serves all layers.

A pair that is cut is finished by the block of its first tile, which waits for the others. Runs are
therefore given out backwards: it waits only for blocks of a lower index, which a GPU starts first,
so that the wait ends even where not all blocks fit on the device at once.

Sources: work in equal runs regardless of output tiles, Osama et al. 2023, "Stream-K",
arXiv:2301.03598; plans made once for all layers, Ye et al. 2025, "FlashInfer", arXiv:2501.01005.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FIELDS = ("row", "offset", "count", "kv_len", "size", "num_rows", "arrived")
"""Columns of `Plan.runs`, one more being padding: where a run begins, by row and unit of that row;
how many units it has; the length of its row; the size of all runs but the last of a stretch; and
the rows of the batch. The last is zero: room for blocks to count those that they wait for, back at
zero when all is done."""
READ = 4  # parts of a pair that are read in the time of one tile
STEPS = 48  # sizes of aligned runs that are tried, each a quarter of an octave above the last


class Plan(NamedTuple):
    """The work of `W` blocks."""

    runs: Int[Array, "W 8"]  # see FIELDS
    next_rows: Int[Array, " B"]  # the row with tokens that comes after each row


def make_plan(
    kv_lens: Int[Array, " B"],
    *,
    num_kv_heads: int,
    num_blocks: int,
    tile: int,
    window: int | None,
    min_run: int,
    merge_cost: int,
) -> Plan:
    """Runs for `num_blocks` blocks; `min_run` and `merge_cost` (of pairs that are cut) in tiles."""
    K = num_kv_heads
    n = tiles_of(kv_lens, tile, window)
    ends = running_sum(n * K)
    even = jnp.maximum(ceil_div(ends[-1], num_blocks), min_run)
    aligned, cost = best_aligned(n, K, num_blocks, min_run, merge_cost)
    is_aligned = cost <= even + merge_cost + jnp.max(n) // even // READ
    size = jnp.where(is_aligned, aligned, even)
    pieces = ceil_div(n, size)  # of each pair of a row
    piece_ends = running_sum(pieces * K)
    num_runs = jnp.where(is_aligned, piece_ends[-1], ceil_div(ends[-1], size))
    run = num_runs - 1 - jnp.arange(num_blocks, dtype=jnp.int32)

    number = jnp.where(is_aligned, run, run * size)  # in whatever ends are numbers of
    row = first_past(jnp.where(is_aligned, piece_ends, ends), number)
    in_row = run - (piece_ends - pieces * K)[row]
    head, piece = in_row // jnp.maximum(pieces[row], 1), in_row % jnp.maximum(pieces[row], 1)
    offset = jnp.where(is_aligned, head * n[row] + piece * size, number - (ends - n * K)[row])
    rest = jnp.where(is_aligned, n[row] - piece * size, ends[-1] - number)
    count = jnp.where(run >= 0, jnp.minimum(size, rest), 0)
    zero = jnp.zeros_like(run)
    size, num_rows = jnp.broadcast_to(size, run.shape), zero + len(kv_lens)
    runs = jnp.stack([row, offset, count, kv_lens[row], size, num_rows, zero, zero], axis=1)
    return Plan(runs, next_rows(kv_lens))


def tiles_of(kv_lens: Int[Array, " B"], tile: int, window: int | None) -> Int[Array, " B"]:
    """Tiles of which the last token sees part."""
    first = 0 if window is None else jnp.maximum(kv_lens - window, 0) // tile
    return ceil_div(kv_lens, tile) - first


def next_rows(kv_lens: Int[Array, " B"]) -> Int[Array, " B"]:
    """The first row with tokens after each row; the last row where there is none."""
    B = len(kv_lens)
    row = jnp.arange(B, dtype=jnp.int32)
    counts = ~_not_after(B) & (kv_lens > 0)[None, :]
    return jnp.min(jnp.where(counts, row[None, :], B - 1), axis=1)


def best_aligned(
    n: Int[Array, " B"], num_kv_heads: int, num_blocks: int, min_run: int, merge_cost: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The cheapest size of runs within pairs, and what it costs; never, if pairs are too many.

    Waiting for partners costs `merge_cost`, reading what they leave a tile for every `READ`.
    """
    size = jnp.asarray([round(min_run * 2 ** (step / 4)) for step in range(STEPS)], jnp.int32)
    pieces = ceil_div(n[None, :], size[:, None])
    most = jnp.max(pieces, axis=1)
    longest = jnp.minimum(size, jnp.max(n))
    cost = longest + jnp.where(most > 1, merge_cost + most // READ, 0)
    fits = jnp.sum(pieces, axis=1) * num_kv_heads <= num_blocks
    cost = jnp.where(fits, cost, jnp.iinfo(jnp.int32).max)
    best = jnp.argmin(cost)
    return size[best], cost[best]


def running_sum(values: Int[Array, " B"]) -> Int[Array, " B"]:
    """As cumsum does; by comparisons, because that is one small kernel for a short array."""
    return jnp.sum(jnp.where(_not_after(len(values)), values[None, :], 0), axis=1)


def first_past(ends: Int[Array, " B"], numbers: Int[Array, " W"]) -> Int[Array, " W"]:
    """Index of the first end past each number; the last index where there is none."""
    past = jnp.sum(ends[None, :] <= numbers[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(past, len(ends) - 1)


def ceil_div(a: Int[Array, "..."], b: Int[Array, "..."] | int) -> Int[Array, "..."]:
    return -(-a // b)


def _not_after(B: int) -> Bool[Array, "B B"]:
    row = jnp.arange(B, dtype=jnp.int32)
    return row[None, :] <= row[:, None]
