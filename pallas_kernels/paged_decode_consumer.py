"""The warpgroup of a block of `paged_decode` that computes: what each segment contributes to the
mean of V, and how such contributions come together."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.paged_decode_own_token import prepare
from jaxengine.pallas_kernels.paged_decode_plan import FIELDS
from jaxengine.pallas_kernels.paged_decode_products import Operations, over_columns, over_rows
from jaxengine.pallas_kernels.paged_decode_segments import (
    Memory,
    Problem,
    Segment,
    for_each_segment,
)

MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
LOG2_E = math.log2(math.e)
ARRIVED = FIELDS.index("arrived")
PIECE = 64  # columns of V that are cleared at a time: more, and registers run short
READ_AT_ONCE = 4096  # elements of others' results: 32 registers of every thread


class Sums(NamedTuple):
    """A weighted mean of V over the tiles so far, not yet divided."""

    peak: jax.Array  # [C]: largest score
    weights: jax.Array  # [tile C]: to be summed over rows at the end
    values: jax.Array  # [H C]


@dataclass(frozen=True)
class Consumer:
    problem: Problem
    memory: Memory
    operations: Operations

    def attend_all(self) -> None:
        for_each_segment(self.problem, self.memory, self.attend)
        plgpu.wait_smem_to_gmem(0)

    def attend(self, _: jax.Array, segment: Segment) -> None:
        """Computes the mean over a segment, and sees that it gets where it belongs."""
        memory, block = self.memory, lax.axis_index("block")
        add = lambda t, sums: self.add_tile(segment, t, sums)
        sums = lax.fori_loop(segment.begin, segment.end, add, self.begin(segment))
        weight = sums.weights.sum(axis=0)
        mean, log = sums.values / over_rows(weight, sums.values), sums.peak + jnp.log2(weight)

        @pl.when(segment.begin > 0)
        def _() -> None:  # the block of the first tile, which has a higher index, does the rest
            self.operations.store(memory.means.at[block], mean)
            self.operations.store(memory.logs.at[block], log)
            runs_before = lax.div(segment.begin + (segment.size - 1), segment.size)
            self.operations.signal(memory.runs.at[block + runs_before, ARRIVED])

        @pl.when(segment.begin == 0)
        def _() -> None:
            rest = segment.num_tiles - segment.end
            partners = lax.div(rest + (segment.size - 1), segment.size)
            counter = memory.runs.at[block, ARRIVED]
            pl.when(partners > 0)(lambda: self.operations.wait(counter, partners))
            self.write(segment, self.merge(partners, log, mean))

    def begin(self, segment: Segment) -> Sums:
        """Queries to where they are multiplied, and the sums before the first tile: nothing, or in
        the first segment of a row and head the own token where that is not read from the cache."""
        problem, memory, operations = self.problem, self.memory, self.operations
        tile, H, C, full = problem.tile, problem.H, problem.C, operations.full
        if problem.prepares:
            own = prepare(problem, memory, operations, segment)
            is_first = (segment.begin == 0).astype(jnp.int32)
            share = is_first.astype(jnp.float32)
            return Sums(
                self.in_base_2(own.scores) * share + (1 - share) * MASKED,
                jnp.where(operations.row_index((tile, C)) < is_first, 1.0, 0.0),
                jnp.where(
                    operations.row_index((H, C)) < is_first * H, over_columns(own.v, (H, C)), 0.0
                ),
            )
        plgpu.barrier_wait(memory.q_full.at[0])
        operations.copy(memory.q_rows, memory.q_tile)
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.q_free.at[0])
        return Sums(full((C,), MASKED), full((tile, C), 0), full((H, C), 0))

    def add_tile(self, segment: Segment, t: jax.Array, sums: Sums) -> Sums:
        """The sums with one more tile in them."""
        memory, operations = self.memory, self.operations
        slot = lax.rem(segment.step + t - segment.begin, self.problem.stages)
        k, v = memory.k_tiles.at[slot], memory.v_tiles.at[slot]
        first = (segment.first_tile + t) * self.problem.tile  # position of the tile's first token
        plgpu.barrier_wait(memory.k_full.at[slot])
        scores = self.in_base_2(operations.scores(k, memory.q_tile))
        scores = jnp.where(self.visible(segment, first, scores.shape), scores, MASKED)
        peak = jnp.maximum(sums.peak, scores.max(axis=0))
        weights = jnp.exp2(scores - over_rows(peak, scores))
        shrink = jnp.exp2(sums.peak - peak)
        operations.store_transposed(memory.weights, weights.astype(memory.weights.dtype))
        plgpu.barrier_wait(memory.v_full.at[slot])
        is_whole = (first >= segment.start) & (first + self.problem.tile <= segment.stop)
        pl.when(jnp.logical_not(is_whole))(lambda: self.clear_unseen(segment, first, v))
        plgpu.commit_smem()
        values = sums.values * over_rows(shrink, sums.values)
        values = operations.add_values(values, v, memory.weights)
        plgpu.barrier_arrive(memory.kv_free.at[slot])
        return Sums(peak, sums.weights * over_rows(shrink, weights) + weights, values)

    def visible(self, segment: Segment, first: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        position = first + self.operations.row_index(shape)
        return (position >= segment.start) & (position < segment.stop)

    def clear_unseen(self, segment: Segment, first: jax.Array, v: Any) -> None:
        """Weights are zero where nothing is seen, but zero times NaN is NaN."""
        visible = self.visible(segment, first, (self.problem.tile, PIECE))
        for column in range(0, self.problem.H, PIECE):
            piece = v.at[:, pl.ds(column, PIECE)]
            values = self.operations.load(piece)
            piece[...] = jnp.where(visible, values, jnp.zeros_like(values))

    def in_base_2(self, products: jax.Array) -> jax.Array:
        """Logarithms of weights to base 2."""
        scale, soft_cap = self.problem.scale, self.problem.soft_cap
        if soft_cap is None:
            return products * (scale * LOG2_E)
        # tanh x = 1 - 2 / (1 + e^2x); the GPU's own approximation of it is too coarse
        power = jnp.exp2(products * (2 * scale / soft_cap * LOG2_E))
        return (1 - 2 / (1 + power)) * (soft_cap * LOG2_E)

    def merge(self, partners: jax.Array, log: jax.Array, mean: jax.Array) -> jax.Array:
        """The mean over this block's part and those of the `partners` blocks before it."""
        memory, load, block = self.memory, self.operations.load, lax.axis_index("block")
        at_once = max(1, READ_AT_ONCE // math.prod(mean.shape))

        def merge_some(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            peak, weight, values = sums
            numbers = [i * at_once + j for j in range(at_once)]
            others = [block - 1 - jnp.minimum(number, partners - 1) for number in numbers]
            logs = [load(memory.logs.at[other]) for other in others]
            means = [load(memory.means.at[other]) for other in others]
            new_peak = peak
            for log in logs:
                new_peak = jnp.maximum(new_peak, log)
            shrink = jnp.exp2(peak - new_peak)
            weight, values = weight * shrink, values * over_rows(shrink, values)
            for number, log, mean in zip(numbers, logs, means, strict=True):
                counts = jnp.where(number < partners, jnp.float32(1), jnp.float32(0))
                share = jnp.exp2(log - new_peak) * counts
                weight, values = weight + share, values + mean * over_rows(share, values)
            return new_peak, weight, values

        rounds = lax.div(partners + (at_once - 1), at_once)
        own = (log, self.operations.full(log.shape, 1), mean)
        _, weight, values = lax.fori_loop(0, rounds, merge_some, own)
        return values / over_rows(weight, values)

    def write(self, segment: Segment, mean: jax.Array) -> None:
        """The columns of `mean` that are query heads, to where those belong."""
        memory, G, H = self.memory, self.problem.G, self.problem.H
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the results of the segment before
        rows = memory.out_rows.at[:, pl.ds(0, H)]
        self.operations.store_transposed(rows, mean.astype(memory.out_rows.dtype))
        plgpu.commit_smem()
        for g in range(G):
            target = memory.out.at[segment.row, pl.ds((segment.head * G + g) * H, H)]
            plgpu.copy_smem_to_gmem(memory.out_rows.at[g, pl.ds(0, H)], target)
