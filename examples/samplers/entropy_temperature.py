"""Entropy-based dynamic temperature: daring where many tokens would do, strict where one is due.

    T = T0 N^(theta / H),   H = -sum p log p in nats,   0 < N < 1

T0 is the request's temperature, which the engine applies afterwards; p is the model's distribution.
T falls to 0 with the entropy and rises towards T0 with it.

Source: Zhang et al. 2024, "EDT: Improving Large Language Models' Generation by Entropy-based
Dynamic Temperature Sampling", arXiv:2403.14541.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row

LIMIT = 1e4  # the factor of a distribution without entropy would be infinite


def entropy_temperature(
    logits: Float[Array, " V"], params: Mapping[str, Array], row: Row
) -> Float[Array, " V"]:
    """Logits, the largest at 0, divided by T / T0."""
    del row  # its temperature is yet to come
    entropy = jax.scipy.special.entr(jax.nn.softmax(logits)).sum()
    factor = params["n"] ** (-params["theta"] / entropy)
    return (logits - logits.max()) * jnp.minimum(factor, LIMIT)


PROCESSOR = LogitsProcessor(function=entropy_temperature, params={"n": 0.8, "theta": 1.0})
