"""Top-k, top-p and min-p as one threshold for each row, found without sorting the vocabulary.

A token is dropped by top-k if at least k tokens have a larger logit, by top-p if those with a
larger logit hold more than top_p of the probability, by min-p if it is less than min_p times as
probable as the likeliest. What holds for a logit holds for every smaller one, so one threshold
expresses all three. Equal logits share their fate; every filter looks at the original distribution.

Floats are ordered as the integers that `to_ordinal` maps them to. Bisection over these finds the
threshold exactly: 32 passes over the logits at most, fewer once a single token is in question.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxengine.sampling.state import SamplingState

SMALLEST_NORMAL = 0x00800000
"""Bits of the smallest positive float32 that is not subnormal."""


class Search(NamedTuple):
    """Ordinals on both sides of each row's threshold, and how many tokens lie above them."""

    low: Int32[Array, " B"]  # dropped, or as low as min-p lets it be
    high: Int32[Array, " B"]  # kept
    above_low: Int32[Array, " B"]  # an upper bound at the start
    above_high: Int32[Array, " B"]


def find_threshold(logits: Float32[Array, "B V"], params: SamplingState) -> Int32[Array, " B"]:
    """The ordinal that a kept token's exceeds: that of -inf in a row that drops nothing."""
    narrows = (params.top_k < logits.shape[1]) | (params.top_p < 1)
    narrows &= params.temperature > 0
    filters = narrows | ((params.min_p > 0) & (params.temperature > 0))
    nothing = jnp.broadcast_to(to_ordinal(jnp.float32(-jnp.inf)), filters.shape)
    return lax.cond(filters.any(), lambda: bisect(logits, params, narrows), lambda: nothing)


def bisect(
    logits: Float32[Array, "B V"], params: SamplingState, narrows: Bool[Array, " B"]
) -> Int32[Array, " B"]:
    """The threshold of every row; only those that `narrows` marks are searched."""
    V = logits.shape[1]
    top = logits.max(axis=1)
    temperature = jnp.where(params.temperature > 0, params.temperature, 1)
    max_above = jnp.where(params.top_k < V, params.top_k - 1, V)
    total = mass(logits, top, temperature, jnp.bool_(True))
    max_mass = jnp.where(params.top_p < 1, params.top_p * total, jnp.inf)

    def is_open(search: Search) -> Bool[Array, " B"]:
        several = search.above_low - search.above_high > 1
        return narrows & several & (search.low + 1 < search.high)

    def halve(search: Search) -> Search:
        middle = (search.low & search.high) + ((search.low ^ search.high) >> 1)  # no overflow
        above = to_ordinal(logits) > middle[:, None]
        num_above = above.sum(axis=1, dtype=jnp.int32)
        kept = (num_above <= max_above) & (mass(logits, top, temperature, above) <= max_mass)
        return Search(
            low=jnp.where(kept, search.low, middle),
            high=jnp.where(kept, middle, search.high),
            above_low=jnp.where(kept, search.above_low, num_above),
            above_high=jnp.where(kept, num_above, search.above_high),
        )

    high = to_ordinal(top)
    floor = to_ordinal(top + temperature * jnp.log(params.min_p))
    low = jnp.clip(floor - 1, to_ordinal(jnp.float32(-jnp.inf)), high - 1)
    search = Search(low, high, jnp.full_like(low, V), jnp.zeros_like(low))
    return lax.while_loop(lambda search: is_open(search).any(), halve, search).low


def mass(
    logits: Float32[Array, "B V"],
    top: Float32[Array, " B"],
    temperature: Float32[Array, " B"],
    of: Bool[Array, "..."],
) -> Float32[Array, " B"]:
    """Probability of the tokens `of`, up to a factor that is the row's own."""
    weights = jnp.exp((logits - top[:, None]) / temperature[:, None])
    return jnp.where(of, weights, 0).sum(axis=1)


def to_ordinal(value: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """An integer that is larger exactly if the float is. Subnormals count as zero: some devices
    compute with them, some do not."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    magnitude = bits & jnp.iinfo(jnp.int32).max
    magnitude = jnp.where(magnitude < SMALLEST_NORMAL, 0, magnitude)
    return jnp.where(bits < 0, -magnitude, magnitude)
