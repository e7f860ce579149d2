"""A consumer of `ragged_extend`'s kernel: one of the two warpgroups of a block that compute.

Scores and sums are in registers. While one consumer computes its softmax the other has the tensor
cores, where it multiplies the weights of a step by V and, at once, queries by the K of the next:

    Q K0' | softmax | P0 V0, Q K1' | softmax | P1 V1, Q K2' | ... | softmax | P V | store

Steps that every query of the consumer sees wholly are not masked. A key that is not seen has a
score of MASKED; peaks start at FLOOR, far above it, so that its weight is zero even where nothing
is seen. V past the end of the sequence is set to zero, since zero times NaN is NaN.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_extend_producer import (
    CONSUMERS,
    M,
    Refs,
    Shape,
    first_token,
)
from jaxengine.pallas_kernels.ragged_extend_products import LAYOUT, Products, over
from jaxengine.pallas_kernels.ragged_extend_tiles import Column

LOG2_E = math.log2(math.e)
MASKED, FLOOR = -1e30, -5e29  # scores in units of log 2


class Sums(NamedTuple):
    """A softmax-weighted mean of V over the steps so far, not yet divided."""

    numerator: jax.Array  # [M H]
    peak: jax.Array  # [M]
    denominator: jax.Array  # [M]


class Part(NamedTuple):
    """A consumer's share of a tile: queries start to stop of the M tokens from `base` on."""

    base: jax.Array
    start: jax.Array
    stop: jax.Array
    position: jax.Array  # of token `base`
    kv_len: jax.Array
    first: jax.Array  # steps of keys: the first of the tile
    seen: jax.Array  # from here on every query sees all keys of a step
    unseen: jax.Array  # and here no longer
    last: jax.Array  # the last that any query sees
    end: jax.Array  # one past the last of the tile


class Consumer(NamedTuple):
    """One of the two warpgroups that compute."""

    shape: Shape
    refs: Refs
    products: Products
    warpgroup: jax.Array

    def attend(
        self, tile: jax.Array, head: jax.Array, steps: jax.Array, is_first: jax.Array
    ) -> jax.Array:
        """Computes and stores a part of a tile; `steps` were done before. Returns its steps."""
        shape, wg = self.shape, self.warpgroup
        part = self.part_of(tile)
        sums = self.accumulate(part, steps - part.first)
        if shape.heads == 1:  # the other part may see more
            begin, end = steps - part.first + part.last + 1, steps - part.first + part.end
            lax.fori_loop(begin, end, self.pass_over, None)
        self.store(sums, part, head + wg if shape.heads == 2 else head)
        if not shape.own_output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.refs.q_free.at[wg])
        return part.end - part.first

    def part_of(self, tile: jax.Array) -> Part:
        shape, keys, window = self.shape, self.shape.keys, self.shape.window
        base, start, stop, position, kv_len, _, first, end = (
            self.refs.tiles[tile, column] for column in Column
        )
        own = base + (self.warpgroup * M if shape.heads == 1 else 0)
        actual = first_token(shape, self.refs, base, self.warpgroup)
        start, stop = jnp.maximum(start, own) - actual, jnp.minimum(stop, own + M) - actual
        position += actual - base
        low, high = position + start, position + stop - 1
        last = jnp.clip(lax.div(jnp.maximum(high, 0), keys), first, end - 1)
        unseen = jnp.clip(lax.div(jnp.maximum(low + 1, 0), keys), first, last)
        seen = first
        if window is not None:
            seen = jnp.clip(lax.div(jnp.maximum(high - window + keys, 0), keys), first, unseen)
        return Part(actual, start, stop, position, kv_len, first, seen, unseen, last, end)

    def accumulate(self, part: Part, offset: jax.Array) -> Sums:
        """Sums over all steps that the part sees. Step s is in slot s + offset of the ring."""
        refs, wg, products = self.refs, self.warpgroup, self.products

        def weigh(scores: jax.Array, sums: Sums, step: jax.Array, masked: bool) -> Any:
            first_key = step * self.shape.keys
            sums, weights = self.softmax(scores, sums, part.position - first_key, masked)
            self.wait_for_values(self.slot(step + offset), part.kv_len - first_key, masked)
            return sums, weights, refs.v_smem.at[self.slot(step + offset)]

        def advance(step: jax.Array, carry: Any, masked: bool) -> Any:
            sums, weights, v = weigh(carry[0], carry[1], step, masked)
            following = self.slot(step + offset + 1)
            plgpu.barrier_wait(refs.k_full.at[following])
            self.wait_for_turn()
            q, k = refs.q_smem.at[wg], refs.k_smem.at[following]
            numerator, scores = products.values_and_scores(
                sums.numerator, weights, v, q, k, self.end_turn
            )
            plgpu.barrier_arrive(refs.v_free.at[self.slot(step + offset)])
            plgpu.barrier_arrive(refs.k_free.at[following])
            return scores, sums._replace(numerator=numerator)

        masked, whole = partial(advance, masked=True), partial(advance, masked=False)
        carry = self.first_scores(self.slot(part.first + offset)), self.no_sums()
        if self.shape.window is not None:
            carry = lax.fori_loop(part.first, part.seen, masked, carry)
        carry = lax.fori_loop(part.seen, part.unseen, whole, carry)
        carry = lax.fori_loop(part.unseen, part.last, masked, carry)
        if self.shape.own_output:
            plgpu.barrier_arrive(refs.q_free.at[wg])
        sums, weights, v = weigh(carry[0], carry[1], part.last, True)
        self.wait_for_turn()
        numerator = products.values(sums.numerator, weights, v, self.end_turn)
        plgpu.barrier_arrive(refs.v_free.at[self.slot(part.last + offset)])
        return sums._replace(numerator=numerator)

    def first_scores(self, slot: jax.Array) -> jax.Array:
        refs, wg = self.refs, self.warpgroup
        plgpu.barrier_wait(refs.q_full.at[wg])
        plgpu.barrier_wait(refs.k_full.at[slot])
        self.wait_for_turn()
        scores = self.products.scores(refs.q_smem.at[wg], refs.k_smem.at[slot], self.end_turn)
        plgpu.barrier_arrive(refs.k_free.at[slot])
        return scores

    def softmax(
        self, scores: jax.Array, sums: Sums, ahead: jax.Array, masked: bool
    ) -> tuple[Sums, jax.Array]:
        """The sums, shrunk, with the weights counted; and the weights. The first query is `ahead`
        of the first key."""
        shape, scale = self.shape, self.shape.score_scale
        if shape.soft_cap is not None:
            # A tanh: the GPU's own has 11 bits, too few for a score.
            scores = 1 - 2 / (1 + jnp.exp2(scores * (2 * LOG2_E * shape.scale / shape.soft_cap)))
        if masked:
            scores = self.products.mask(scores, ahead, shape.window, max(MASKED / scale, -3e38))
        peak = jnp.maximum(sums.peak, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * scale - over(peak, scores))
        shrink = jnp.exp2(sums.peak - peak)
        numerator = sums.numerator * over(shrink, sums.numerator)
        denominator = sums.denominator * shrink + weights.sum(axis=1)
        # All of it now: none is to wait until the warpgroup has its turn.
        return lax.optimization_barrier(
            (Sums(numerator, peak, denominator), weights.astype(shape.dtype))
        )

    def wait_for_values(self, slot: jax.Array, num_left: jax.Array, masked: bool) -> None:
        """V of a step, zero where `num_left` keys or more into it."""
        plgpu.barrier_wait(self.refs.v_full.at[slot])
        if not masked:
            return

        @pl.when(num_left < self.shape.keys)
        def _() -> None:
            # Both consumers do, each for itself: what they write is the same.
            for i in range(0, self.shape.keys, M):
                part = self.refs.v_smem.at[slot, pl.ds(i, M)]
                values = self.products.cast(part[...], LAYOUT)
                keep = self.products.iota(values.shape, 0) < num_left - i
                part[...] = jnp.where(keep, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def store(self, sums: Sums, part: Part, head: jax.Array) -> None:
        """Any number of tokens, by powers of two."""
        refs, out = self.refs, self.refs.out_smem.at[self.warpgroup]
        seen = jnp.where(sums.denominator == 0, 1.0, sums.denominator)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        values = (sums.numerator * over(1 / seen, sums.numerator)).astype(out.dtype)
        num_parts, _, columns = out.shape
        for i in range(num_parts):
            first = i * columns
            out[i] = values if num_parts == 1 else values[:, first : first + columns]
        plgpu.commit_smem()
        start, count, size = part.start, jnp.maximum(part.stop - part.start, 0), M
        while size:

            @pl.when(count & size != 0)
            def _(start: jax.Array = start, size: int = size) -> None:
                for i in range(num_parts):
                    target = refs.out.at[
                        pl.ds(part.base + start, size), head, pl.ds(i * columns, columns)
                    ]
                    plgpu.copy_smem_to_gmem(out.at[i, pl.ds(start, size)], target)

            start = start + (count & size)
            size //= 2

    def pass_over(self, steps: jax.Array, _: None) -> None:
        """A step that only the other consumer needs."""
        slot = self.slot(steps)
        for full, free in (
            (self.refs.k_full, self.refs.k_free),
            (self.refs.v_full, self.refs.v_free),
        ):
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_arrive(free.at[slot])
        self.wait_for_turn()
        self.end_turn()

    def no_sums(self) -> Sums:
        shape, cast, each = self.shape, self.products.cast, LAYOUT.reduce(1)
        return Sums(
            cast(jnp.zeros((M, shape.H), jnp.float32), LAYOUT),
            cast(jnp.full(M, FLOOR, jnp.float32), each),
            cast(jnp.zeros(M, jnp.float32), each),
        )

    def slot(self, steps: jax.Array) -> jax.Array:
        return lax.rem(steps, self.shape.stages)

    def wait_for_turn(self) -> None:
        plgpu.barrier_wait(self.refs.turn.at[self.warpgroup])

    def end_turn(self) -> None:
        plgpu.barrier_arrive(self.refs.turn.at[CONSUMERS - 1 - self.warpgroup])
