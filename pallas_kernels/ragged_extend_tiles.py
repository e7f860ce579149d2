"""The list of tiles that `ragged_extend` works through: who computes what, in plain jnp.

A tile is some query tokens of one row. The list is made anew for every batch, by a few operations
on small arrays; layers that attend alike share one list, since XLA computes equal things once.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

ALIGNMENT = 8  # tokens: where a copy of queries may begin
MAX_SECTIONS = 2**14
MAX_WORK = 2**16


class Column(IntEnum):
    """What the list says of each tile."""

    BASE = 0  # its first token, a multiple of ALIGNMENT
    START = 1  # tokens before this one are not its own
    END = 2
    POSITION = 3  # of token BASE in its sequence
    KV_LEN = 4
    ROW = 5
    FIRST_STEP = 6  # of keys, counted from position 0
    END_STEP = 7


def cut_into_tiles(
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    *,
    num_tokens: int,
    size: int,
    keys: int,
    window: int | None,
    section: int,
    min_query_len: int,
) -> tuple[Int[Array, "tiles columns"], Int[Array, " 1"]]:
    """Tiles of at most `size` tokens, and how many of the list there are.

    Tokens of no row, or of a row that is too short, have tiles that see nothing: so every token of
    the output is written. Rows whose caches hold about `section` tokens are worked on together,
    so that K and V are mostly found in the L2 cache; among them the tiles with most keys come
    first. (In many sections blocks would be less even: those with the longest tiles of one may
    have had the longest of another.)
    """
    T, B = num_tokens, len(query_lens)
    starts, ends = find_segments(query_starts, query_lens, T, min_query_len)
    first = starts // ALIGNMENT * ALIGNMENT
    num_tiles = jnp.where(ends > starts, -(-(ends - first) // size), 0)
    num_before = jnp.cumsum(num_tiles)
    num_slots = (T + min(2 * B + 1, T) * (size + ALIGNMENT - 2)) // size  # whatever the lengths are

    tile = jnp.arange(num_slots, dtype=jnp.int32)
    # All at once: the default binary search would be a loop of its own.
    segment = jnp.searchsorted(num_before, tile, side="right", method="compare_all")
    segment = jnp.minimum(segment, 2 * B).astype(jnp.int32)
    row, is_row = jnp.minimum(segment // 2, B - 1), segment % 2 == 1
    base = first[segment] + (tile - (num_before - num_tiles)[segment]) * size
    start, end = jnp.maximum(base, starts[segment]), jnp.minimum(base + size, ends[segment])
    # Before position 0 no key is seen.
    position = jnp.where(is_row, (kv_lens - query_lens - query_starts)[row] + base, -2 * size)
    first_key = 0 if window is None else position + (start - base) - window + 1
    last_key = position + (end - base) - 1
    columns = {
        Column.BASE: base,
        Column.START: start,
        Column.END: end,
        Column.POSITION: position,
        Column.KV_LEN: jnp.where(is_row, kv_lens[row], 0),
        Column.ROW: row,
        Column.FIRST_STEP: jnp.where(is_row, jnp.maximum(first_key, 0) // keys, 0),
        Column.END_STEP: jnp.maximum(last_key, 0) // keys + 1,
    }
    table = jnp.stack([columns[column] for column in Column], axis=1).astype(jnp.int32)
    work = columns[Column.END_STEP] - columns[Column.FIRST_STEP]
    kv_before = jnp.cumsum(jnp.where(query_lens >= min_query_len, kv_lens, 0)) - kv_lens
    sections = jnp.clip(kv_before // section, 0, MAX_SECTIONS - 1)[row]
    last = jnp.where(tile < num_before[-1], MAX_SECTIONS, MAX_SECTIONS + 1)
    sections = jnp.where(is_row & (tile < num_before[-1]), sections, last)
    order = sections * MAX_WORK - jnp.minimum(work, MAX_WORK - 1)
    return table.at[rank(order)].set(table, unique_indices=True), num_before[-1:].astype(jnp.int32)


def find_segments(
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    num_tokens: int,
    min_query_len: int,
) -> tuple[Int[Array, " 2*B+1"], Int[Array, " 2*B+1"]]:
    """Where they start and end: what is before the first row that is long enough, that row, what is
    between it and the next such row, ..., what is after the last. Many are empty."""
    is_extend = query_lens >= min_query_len
    row_ends = jnp.where(is_extend, query_starts + query_lens, 0)
    gap_starts = jnp.pad(jax.lax.cummax(row_ends), (1, 0))
    gap_ends = jnp.append(jnp.where(is_extend, query_starts, 0), num_tokens)
    starts = jnp.stack([gap_starts, jnp.append(query_starts, 0)], axis=1).reshape(-1)
    ends = jnp.stack([gap_ends, jnp.append(row_ends, 0)], axis=1).reshape(-1)
    return starts[:-1], ends[:-1]


def rank(order: Int[Array, " tiles"]) -> Int[Array, " tiles"]:
    """Places after a stable sort, by counting: one operation, where a sort would be many."""
    place = jnp.arange(len(order), dtype=jnp.int32)
    is_before: Bool[Array, "tiles tiles"] = (order[None] < order[:, None]) | (
        (order[None] == order[:, None]) & (place[None] < place[:, None])
    )
    return is_before.sum(axis=1, dtype=jnp.int32)
