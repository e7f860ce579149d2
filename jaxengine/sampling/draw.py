"""A draw from what the filters of each row keep, without searching for what that is.

A token is drawn as if there were no filters. If they keep it, it is the draw: each token that they
keep had its due chance. If they drop it, they drop every token whose logit is no larger as well; so
the next attempt draws, with noise of its own, from the tokens above it, and so on. An attempt
succeeds with the probability of what the filters keep, for a top_p of 0.95 with at least that, and
takes one pass over the logits; the pass that draws again is also the one that tests the last draw.

It is plain XLA: what a CPU runs, and what the kernel of `pallas_kernels/sample.py` is compared
with. How one token is drawn by way of groups is told in `pallas_kernels/noise.py`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

from jaxengine.pallas_kernels.noise import (
    GROUP_SIZE,
    OF_GROUPS,
    OF_TOKENS,
    attempt_key,
    exponential,
)
from jaxengine.sampling.filters import Limits, find_limits, keeps, looks_above, temperature_of
from jaxengine.sampling.state import SamplingState


class Rows(NamedTuple):
    """What is drawn from, by groups: token `g + i Q` is in place `[i, g]`."""

    logits: Float32[Array, "B GROUP Q"]  # -inf beyond the vocabulary
    top: Float32[Array, " B"]  # the largest
    params: SamplingState
    positions: Int[Array, " B"]


class Sums(NamedTuple):
    """Number and probability of some of each row's tokens; the likeliest token counts as 1."""

    count: Int32[Array, "B Q"]
    mass: Float32[Array, "B Q"]


class Attempt(NamedTuple):
    """The token that each row drew last."""

    number: Int32[Array, ""]
    token: Int32[Array, " B"]
    logit: Float32[Array, " B"]
    is_open: Bool[Array, " B"]  # whether the filters may drop it


def draw(
    logits: Float32[Array, "B V"], params: SamplingState, positions: Int[Array, " B"]
) -> Int32[Array, " B"]:
    """One token of what each row's filters keep, with the probability that its temperature gives.

    Unspecified where the temperature is 0 and where logits are NaN, +inf, or all -inf.
    """
    V, rows = logits.shape[1], by_groups(logits, params, positions)
    nothing = jnp.full_like(rows.top, -jnp.inf)
    everything = add_up(rows, nothing, nothing)
    limits = find_limits(params, rows.top, everything.mass.sum(axis=1), V)
    token, logit = pick(rows, everything, nothing, nothing, jnp.int32(0))
    is_open = looks_above(params, V) | (logit < limits.floor)
    is_open &= (params.temperature > 0) & jnp.isfinite(rows.top)
    return lax.while_loop(
        lambda last: last.is_open.any(),
        lambda last: try_again(rows, limits, last, V),
        Attempt(jnp.int32(0), token, logit, is_open),
    ).token


def by_groups(
    logits: Float32[Array, "B V"], params: SamplingState, positions: Int[Array, " B"]
) -> Rows:
    B, V = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -V % GROUP_SIZE)), constant_values=-jnp.inf)
    return Rows(padded.reshape(B, GROUP_SIZE, -1), logits.max(axis=1), params, positions)


def try_again(rows: Rows, limits: Limits, last: Attempt, V: int) -> Attempt:
    """Closes each row whose filters keep its token; the others draw from the tokens above theirs,
    as far as min-p keeps them."""
    sums, number = add_up(rows, last.logit, limits.floor), last.number + 1
    # What min-p drops is missing from the sums only if it drops the token in question too.
    is_kept = keeps(limits, last.logit, sums.count.sum(axis=1), sums.mass.sum(axis=1))
    redraws = last.is_open & ~is_kept
    token, logit = pick(rows, sums, last.logit, limits.floor, number)
    return Attempt(
        number,
        jnp.where(redraws, token, last.token),
        jnp.where(redraws, logit, last.logit),
        redraws & looks_above(rows.params, V),
    )


def add_up(rows: Rows, above: Float32[Array, " B"], floor: Float32[Array, " B"]) -> Sums:
    """Each group's tokens with a logit `> above` and `>= floor`."""
    counts = (rows.logits > above[:, None, None]) & (rows.logits >= floor[:, None, None])
    temperature = temperature_of(rows.params)[:, None, None]
    weights = jnp.exp((rows.logits - rows.top[:, None, None]) / temperature)
    return Sums(counts.sum(axis=1, dtype=jnp.int32), jnp.where(counts, weights, 0).sum(axis=1))


def pick(
    rows: Rows,
    sums: Sums,
    above: Float32[Array, " B"],
    floor: Float32[Array, " B"],
    number: Int32[Array, ""],
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """A token drawn from those that `sums` are of, and its logit: first its group, then itself."""
    Q, seed = sums.mass.shape[1], rows.params.seed[:, :, None]
    key = attempt_key((seed[:, 0], seed[:, 1]), rows.positions[:, None], number)
    groups = jnp.arange(Q, dtype=jnp.int32)[None, :]
    noisy = jnp.log(sums.mass) - jnp.log(exponential(key, groups, OF_GROUPS))
    group = jnp.argmax(noisy, axis=1).astype(jnp.int32)[:, None]
    tokens = group + Q * jnp.arange(GROUP_SIZE, dtype=jnp.int32)[None, :]
    logits = jnp.take_along_axis(rows.logits, group[:, None, :], axis=2)[:, :, 0]
    scaled = (logits - rows.top[:, None]) / temperature_of(rows.params)[:, None]
    noisy = scaled - jnp.log(exponential(key, tokens, OF_TOKENS))
    counts = (logits > above[:, None]) & (logits >= floor[:, None])
    place = jnp.argmax(jnp.where(counts, noisy, -jnp.inf), axis=1)[:, None]
    token, logit = (jnp.take_along_axis(a, place, axis=1)[:, 0] for a in (tokens, logits))
    return token, logit
