"""Min-p: the surer the model is, the fewer tokens are left to draw from.

    keep x  if  p(x) >= min_p max_y p(y)

p is the distribution at the request's temperature. The engine has this built in as `min_p`; here it
is the shortest example of how to add such a thing.

Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
Outputs", arXiv:2407.01082.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row


def min_p(logits: Float[Array, " V"], params: Mapping[str, Array], row: Row) -> Float[Array, " V"]:
    """Logits with -inf for what is dropped."""
    temperature = jnp.where(row.sampling.temperature > 0, row.sampling.temperature, 1)
    floor = logits.max() + temperature * jnp.log(params["min_p"])
    return jnp.where(logits >= floor, logits, -jnp.inf)


PROCESSOR = LogitsProcessor(function=min_p, params={"min_p": 0.1})
