"""XTC, "exclude top choices": now and then the likeliest ways to go on are not open.

With the given probability, of all tokens with p(x) >= threshold only the least likely stays. The
tail is left as it is, so what is drawn is unusual and still plausible. Where at most one token
reaches the threshold, nothing changes. p is the distribution at the request's temperature; equally
likely tokens share their fate.

Source: p-e-w 2024, "Exclude Top Choices", github.com/oobabooga/text-generation-webui/pull/6335.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row

PURPOSE = 0x787463  # other functions draw from the same row's key


def xtc(logits: Float[Array, " V"], params: Mapping[str, Array], row: Row) -> Float[Array, " V"]:
    """Logits with -inf for what is excluded."""
    temperature = jnp.where(row.sampling.temperature > 0, row.sampling.temperature, 1)
    log_probs = jax.nn.log_softmax(logits / temperature)
    is_top = log_probs >= jnp.log(params["threshold"])
    least = jnp.where(is_top, logits, jnp.inf).min()
    happens = jax.random.bernoulli(jax.random.fold_in(row.key, PURPOSE), params["probability"])
    return jnp.where(happens & is_top & (logits > least), -jnp.inf, logits)


PROCESSOR = LogitsProcessor(function=xtc, params={"threshold": 0.1, "probability": 0.5})
