"""Locally typical sampling: tokens that say about as much as is expected here.

With the entropy H = -sum p log p, tokens are taken in the order of

    |-log p(x) - H|

until together they have the probability `mass`. So the likeliest tokens go, too, where they are
much likelier than what is typical. p is the distribution at the request's temperature. Tokens that
are equally typical share their fate.

Source: Meister et al. 2022, "Locally Typical Sampling", arXiv:2202.00666.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row


def typical(
    logits: Float[Array, " V"], params: Mapping[str, Array], row: Row
) -> Float[Array, " V"]:
    """Logits with -inf for what is dropped. It sorts the vocabulary, unlike the engine's own
    filters."""
    temperature = jnp.where(row.sampling.temperature > 0, row.sampling.temperature, 1)
    log_probs = jax.nn.log_softmax(logits / temperature)
    probs = jnp.exp(log_probs)
    entropy = jax.scipy.special.entr(probs).sum()
    distance = jnp.abs(log_probs + entropy)
    tokens = jnp.arange(len(logits))
    distance, probs, tokens = lax.sort((distance, probs, tokens), num_keys=1)
    num_before = (jnp.cumsum(probs) < params["mass"]).sum()
    limit = distance[jnp.minimum(num_before, len(logits) - 1)]  # rounded sums may miss 1
    stays = jnp.zeros_like(logits, bool).at[tokens].set(distance <= limit)
    return jnp.where(stays, logits, -jnp.inf)


PROCESSOR = LogitsProcessor(function=typical, params={"mass": 0.9})
