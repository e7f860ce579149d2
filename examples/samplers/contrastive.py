"""Contrastive decoding: what a good model likes and a bad one of its kind does not.

    score(x) = log p_expert(x) - log p_amateur(x)   if  p_expert(x) >= alpha max_y p_expert(y)
             = -inf                                 otherwise

The engine's model is the expert. The amateur is a function of all tokens so far, computed anew at
every token: it should be small, and its weights become constants of the compiled step.

Source: Li et al. 2022, "Contrastive Decoding: Open-ended Text Generation as Optimization",
arXiv:2210.15097.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.sampling.extensions import LogitsProcessor, Row

LogitsOf = Callable[[Int[Array, " C"], Int[Array, ""]], Float[Array, " V"]]
"""Logits for the token behind the first `length` of `tokens`; the others are unspecified."""


def processor(logits_of: LogitsOf) -> LogitsProcessor:
    """With such an amateur; `temperature` is the amateur's."""

    def contrast(
        logits: Float[Array, " V"], params: Mapping[str, Array], row: Row
    ) -> Float[Array, " V"]:
        expert = jax.nn.log_softmax(logits)
        amateur = jax.nn.log_softmax(logits_of(row.tokens, row.length) / params["temperature"])
        is_plausible = logits >= logits.max() + jnp.log(params["alpha"])
        return jnp.where(is_plausible, expert - amateur, -jnp.inf)

    return LogitsProcessor(function=contrast, params={"alpha": 0.1, "temperature": 1.0})
