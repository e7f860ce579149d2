"""Top-k, top-p and min-p as a question about one token: do the filters keep it?

A token is dropped by top-k if at least k tokens have a larger logit, by top-p if those with a
larger logit hold more than top_p of the probability, by min-p if it is less than min_p times as
probable as the likeliest. What drops a logit drops every smaller one: what the filters keep is an
upper set of the logits. Equal logits share their fate; every filter looks at the original
distribution.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jaxengine.sampling.state import SamplingState


class Limits(NamedTuple):
    """What each row's filters ask of a token they keep."""

    max_above: Int32[Array, " B"]  # tokens with a larger logit
    max_mass: Float32[Array, " B"]  # of these, where the likeliest token has mass 1
    floor: Float32[Array, " B"]  # the smallest logit


def find_limits(
    params: SamplingState, top: Float32[Array, " B"], total: Float32[Array, " B"], V: int
) -> Limits:
    """Of rows with largest logit `top` whose tokens have mass `total`."""
    return Limits(
        max_above=jnp.where(params.top_k < V, params.top_k - 1, V),
        max_mass=jnp.where(params.top_p < 1, params.top_p * total, jnp.inf),
        floor=top + temperature_of(params) * jnp.log(params.min_p),
    )


def keeps(
    limits: Limits,
    logit: Float32[Array, " B"],
    num_above: Int32[Array, " B"],
    mass_above: Float32[Array, " B"],
) -> Bool[Array, " B"]:
    """Whether each row keeps a token of this logit, given what lies above it."""
    within = (num_above <= limits.max_above) & (mass_above <= limits.max_mass)
    return within & (logit >= limits.floor)


def looks_above(params: SamplingState, V: int) -> Bool[Array, " B"]:
    """Rows where it matters what lies above a token: those with top-k or top-p."""
    return (params.top_k < V) | (params.top_p < 1)


def temperature_of(params: SamplingState) -> Float32[Array, " B"]:
    """What to divide logits by; 1 in a greedy row."""
    return jnp.where(params.temperature > 0, params.temperature, 1)
