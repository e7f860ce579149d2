"""What both warpgroups of a block of `paged_decode` know: the problem, the memory, and the segments
that the block's part of the work falls into, one for each (row, kv head) that it touches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernel is compiled for."""

    N: int
    K: int
    H: int
    page_size: int
    tile: int
    stages: int
    blocks: int
    scale: float
    window: int | None
    soft_cap: float | None
    prepares: bool = False  # queries come as projected, with their token's own K and V
    eps: float = 0.0  # of head norms

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def C(self) -> int:
        """Columns of a product."""
        return -(-self.G // 8) * 8

    @property
    def width(self) -> int:
        """Heads that come with one kv head."""
        return self.G + 2 * self.prepares

    @property
    def box(self) -> int:
        """Tokens of one copy."""
        return min(self.page_size, self.tile)

    @property
    def boxes(self) -> int:
        return self.tile // self.box

    @property
    def writes_zeros(self) -> bool:
        """For rows without tokens: a warpgroup stores a multiple of 128 elements."""
        return self.N * self.H % 128 == 0


class Memory(NamedTuple):
    """All that a block sees: in global memory, then its own."""

    runs: Any
    next_rows: Any
    kv_lens: Any
    page_table: Any
    q: Any  # each kv head's query heads, and behind them k and v where the kernel prepares
    kv: Any
    out: Any
    means: Any
    logs: Any
    q_rows: Any
    q_tile: Any
    k_tiles: Any
    v_tiles: Any
    weights: Any
    out_rows: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    kv_free: Any
    # Where the kernel prepares.
    cos: Any = None
    sin: Any = None
    page_ids: Any = None
    offsets: Any = None
    q_norm: Any = None
    k_norm: Any = None
    new_kv: Any = None  # in the memory of `kv`


class Segment(NamedTuple):
    """The part of a run within one (row, kv head): tiles `[begin, end)` of those that are seen."""

    row: jax.Array
    head: jax.Array
    kv_len: jax.Array
    start: jax.Array  # first position that is seen
    stop: jax.Array  # one past the last that is read: that of the own token comes with the queries
    first_tile: jax.Array  # the one it lies in, which counts as tile 0
    num_tiles: jax.Array
    begin: jax.Array
    end: jax.Array
    step: jax.Array  # tiles that the block has done before
    size: jax.Array  # of the other runs of this (row, kv head)


def for_each_segment(
    problem: Problem, memory: Memory, do: Callable[[jax.Array, Segment], None]
) -> tuple[jax.Array, jax.Array]:
    """Calls `do(index, segment)` for each of this block; how many there were, and of tiles."""
    tile, block = problem.tile, lax.axis_index("block")
    row, offset, count, kv_len, size = (memory.runs[block, i] for i in range(5))

    def visit(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        index, step, row, offset, left, kv_len = state
        next_row = memory.next_rows[row]  # read early, used late
        next_len = memory.kv_lens[next_row]
        start = kv_len * 0 if problem.window is None else jnp.maximum(kv_len - problem.window, 0)
        first_tile = lax.div(start, tile)
        num_tiles = lax.div(kv_len + (tile - 1), tile) - first_tile
        head = lax.div(offset, num_tiles)
        begin = offset - head * num_tiles
        end = jnp.minimum(num_tiles, begin + left)
        places = start, kv_len - int(problem.prepares), first_tile, num_tiles, begin, end
        do(index, Segment(row, head, kv_len, *places, step, size))
        done = end - begin
        is_last = offset + done == num_tiles * problem.K
        row, kv_len = jnp.where(is_last, next_row, row), jnp.where(is_last, next_len, kv_len)
        offset = jnp.where(is_last, 0, offset + done)
        return index + 1, step + done, row, offset, left - done, kv_len

    zero = jnp.int32(0)
    state = lax.while_loop(
        lambda state: state[4] > 0, visit, (zero, zero, row, offset, count, kv_len)
    )
    return state[0], state[1]
