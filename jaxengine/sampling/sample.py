"""One token for each row of logits: penalties, the ban on early stops, biases, temperature, top-k
and top-p together, min-p, the draw. It knows nothing of what becomes of the token."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from jaxengine.sampling.adjust import adjust
from jaxengine.sampling.noise import gumbel
from jaxengine.sampling.state import SamplingState
from jaxengine.sampling.threshold import find_threshold, to_ordinal

UNUSABLE = -1
"""Instead of a token, where the logits define none."""


def sample(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> Int32[Array, " B"]:
    """The next token of each row, the argmax where its temperature is 0.

    `history[slots]` holds each row's prompt and output so far, `lengths` of them, which is the
    position of the token to come. A row gets UNUSABLE if its adjusted logits hold NaN or +inf or
    are all -inf. No row depends on another.
    """
    logits = adjust(logits, params, history, slots, lengths)
    likeliest = jnp.argmax(logits, axis=1).astype(jnp.int32)
    is_random = params.temperature > 0
    drawn = lax.cond(is_random.any(), lambda: draw(logits, params, lengths), lambda: likeliest)
    usable = jnp.isfinite(logits.max(axis=1)) & ~jnp.isnan(logits).any(axis=1)
    return jnp.where(usable, jnp.where(is_random, drawn, likeliest), UNUSABLE)


def draw(
    logits: Float32[Array, "B V"], params: SamplingState, positions: Int[Array, " B"]
) -> Int32[Array, " B"]:
    """A draw from each row's softmax at its temperature, of what its filters keep."""
    temperature = jnp.where(params.temperature > 0, params.temperature, 1)
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature[:, None]
    kept = to_ordinal(logits) > find_threshold(logits, params)[:, None]
    noisy = scaled + gumbel(params.seed, positions, logits.shape[1])
    return jnp.argmax(jnp.where(kept, noisy, -jnp.inf), axis=1).astype(jnp.int32)
