"""Mirostat 2.0: text whose tokens surprise by `tau` bits on average, however long it gets.

A token's surprise is S(x) = -log2 p(x), at the request's temperature. What surprises by more than
mu is dropped; then the error of the token that was drawn moves mu:

    mu <- mu - eta (S(x) - tau),   mu = 2 tau in the beginning

The likeliest token always stays. Register it behind any other processors: the surprise is of the
distribution that this one sees.

Source: Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
Perplexity", arXiv:2007.14966, algorithm 2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.sampling.extensions import LogitsProcessor, Row


class State(NamedTuple):
    """Of one request."""

    max_surprise: Float[Array, ""]  # mu, bits
    log_norm: Float[Array, ""]  # logsumexp of the last scaled logits, before any was dropped


def init(params: Mapping[str, Array]) -> State:
    return State(2 * params["tau"], jnp.zeros_like(params["tau"]))


def truncate(
    logits: Float[Array, " V"], params: Mapping[str, Array], row: Row, state: State
) -> tuple[Float[Array, " V"], State]:
    """Logits with -inf for what surprises too much."""
    scaled = logits / temperature_of(row)
    log_norm = jax.nn.logsumexp(scaled)
    surprise = (log_norm - scaled) / jnp.log(2.0)
    is_likeliest = jnp.arange(len(logits)) == logits.argmax()
    stays = (surprise <= state.max_surprise) | is_likeliest
    return jnp.where(stays, logits, -jnp.inf), state._replace(log_norm=log_norm)


def after(
    state: State,
    params: Mapping[str, Array],
    row: Row,
    token: Int[Array, ""],
    logits: Float[Array, " V"],
) -> State:
    """The limit for the next token."""
    surprise = (state.log_norm - logits[token] / temperature_of(row)) / jnp.log(2.0)
    error = surprise - params["tau"]
    return state._replace(max_surprise=state.max_surprise - params["eta"] * error)


def temperature_of(row: Row) -> Float[Array, ""]:
    return jnp.where(row.sampling.temperature > 0, row.sampling.temperature, 1)


PROCESSOR = LogitsProcessor(
    function=truncate, params={"tau": 3.0, "eta": 0.1}, init=init, after=after
)
