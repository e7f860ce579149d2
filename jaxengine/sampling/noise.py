"""The randomness of sampling: a function of a request's seed and a token's position, nothing else.
It knows neither slots nor batches, so a request draws the same noise wherever it runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32


def gumbel(
    seed: UInt32[Array, "B 2"], positions: Int[Array, " B"], V: int
) -> Float32[Array, "B V"]:
    """Independent Gumbel noise; the argmax of logits plus it is a draw from their softmax.

    It is -log(E) for the exponential E = -log(1 - u), u uniform on a grid of 2**-32. Small E
    decides, and there u has all its bits: a token of probability 2**-30 still gets its due.

    Source: the trick, Maddison et al. 2014, arXiv:1411.0030.
    """

    def bits(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (V,), jnp.uint32)

    u = (jax.vmap(bits)(seed, positions).astype(jnp.float32) + 0.5) * 2.0**-32
    exponential = -jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24))
    return -jnp.log(exponential)
