"""Eta sampling: a floor for probabilities, lower where the model is at a loss.

    keep x  if  p(x) >= min(epsilon, sqrt(epsilon) exp(-H)),   H = -sum p log p

where 0 < epsilon < 1 and p is the distribution at the request's temperature. The likeliest token
stays, as it has at least the probability exp(-H).

Source: Hewitt et al. 2022, "Truncation Sampling as Language Model Desmoothing", arXiv:2210.15191.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row


def eta(logits: Float[Array, " V"], params: Mapping[str, Array], row: Row) -> Float[Array, " V"]:
    """Logits with -inf for what is dropped."""
    temperature = jnp.where(row.sampling.temperature > 0, row.sampling.temperature, 1)
    log_probs = jax.nn.log_softmax(logits / temperature)
    entropy = jax.scipy.special.entr(jnp.exp(log_probs)).sum()
    log_epsilon = jnp.log(params["epsilon"])
    floor = jnp.minimum(log_epsilon, log_epsilon / 2 - entropy)
    return jnp.where(log_probs >= floor, logits, -jnp.inf)


PROCESSOR = LogitsProcessor(function=eta, params={"epsilon": 9e-4})
