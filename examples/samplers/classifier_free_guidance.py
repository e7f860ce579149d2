"""Classifier-free guidance: what the prompt changes about the model's answer, made stronger.

    score(x) = gamma log p(x | prompt) + (1 - gamma) log p(x | guide)

The guide is a second prompt, usually the last words of the first or its opposite, and is a request
like any other. Both are of one `group`, so they draw in the same steps, and get the same token, so
that the guide follows the answer. Top-k and the like do not count, since the token is drawn here:
the engine's noise depends on the position, and the two prompts differ in length.

A prompt without its guide gives NaN logits, which end a request with the reason "NaN happened",
rather than unguided text.

Source: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", arXiv:2306.17806.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row


def guide(
    logits: Float[Array, "B V"], params: Mapping[str, Array], row: Row
) -> Float[Array, "B V"]:
    """Logits that leave each row of a pair one token, drawn at the prompt's temperature."""
    B, V = logits.shape
    pair, is_guide, num_drawn = params["pair"], params["is_guide"], row.length - row.prompt_len
    is_other = (pair[:, None] == pair[None, :]) & (is_guide[:, None] != is_guide[None, :])
    is_other &= num_drawn[:, None] == num_drawn[None, :]
    other, itself = jnp.argmax(is_other, axis=1), jnp.arange(B)
    prompts, guides = jnp.where(is_guide, other, itself), jnp.where(is_guide, itself, other)

    log_probs, scale = jax.nn.log_softmax(logits, axis=1), params["scale"][prompts][:, None]
    guided = scale * log_probs[prompts] + (1 - scale) * log_probs[guides]
    is_allowed = jnp.isfinite(log_probs[prompts]) & jnp.isfinite(log_probs[guides])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(row.key[prompts])
    noisy = guided + row.sampling.temperature[prompts][:, None] * noise
    token = jnp.where(is_allowed, noisy, -jnp.inf).argmax(axis=1)

    drawn = jnp.where(jnp.arange(V)[None, :] == token[:, None], guided, -jnp.inf)
    return jnp.where(is_other.any(axis=1, keepdims=True), drawn, jnp.nan)


def pair_of(number: int, scale: float, sampling_params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sampling parameters for `[prompt, guide]`. Pairs that run together have different numbers,
    from 0 on."""
    return [
        {
            **sampling_params,
            "group": number,
            "logits_processors": ["classifier_free_guidance"],
            "custom_params": {"pair": number, "is_guide": is_guide, "scale": scale},
        }
        for is_guide in (False, True)
    ]


PROCESSOR = LogitsProcessor(
    function=guide, params={"pair": -1, "is_guide": False, "scale": 1.5}, batched=True
)
