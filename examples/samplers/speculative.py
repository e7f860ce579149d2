"""The acceptance rule of speculative sampling: cheap drafts, and not a bit of difference in what
comes out.

A draft model drew x_1 ... x_K from q_1 ... q_K; the target model tells p_1 ... p_K+1 in one step.
x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)). Behind the last of the accepted ones,
one token is drawn from the normalised max(p - q, 0) of the place that failed; or, if none did, from
p_K+1. Every token then has the target's distribution.

Sources: Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192; Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative
Sampling", arXiv:2302.01318.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Accepted(NamedTuple):
    num_accepted: Int[Array, ""]  # of the draft, 0 to K
    next_token: Int[Array, ""]  # behind these


def accept(
    draft_tokens: Int[Array, " K"],
    draft_probs: Float[Array, "K V"],
    target_probs: Float[Array, "K+1 V"],
    key: Key[Array, ""],
) -> Accepted:
    """How much of a draft stands, and the token behind it. A pure function of its arguments."""
    K = len(draft_tokens)
    accept_key, draw_key = jax.random.split(key)
    places = jnp.arange(K), draft_tokens
    chance = jax.random.uniform(accept_key, (K,))
    is_accepted = chance * draft_probs[places] < target_probs[places]
    num_accepted = jnp.cumprod(is_accepted.astype(jnp.int32)).sum()

    target = target_probs[num_accepted]
    no_draft = jnp.zeros_like(target)  # behind all of it: max(p - 0, 0) is p
    draft = jnp.vstack([draft_probs, no_draft])[num_accepted]
    residual = jnp.maximum(target - draft, 0)
    residual = jnp.where(residual.any(), residual, target)  # p = q, and rounding failed it
    return Accepted(num_accepted, jax.random.categorical(draw_key, jnp.log(residual)))
