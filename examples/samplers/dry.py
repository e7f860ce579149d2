"""DRY, "don't repeat yourself": a token that would prolong a repetition costs the more the longer
that repetition is.

If the last n tokens stand at an earlier place too, the token x that followed them there gets

    logit(x) - multiplier base^(n - allowed_length)     where n >= allowed_length

for the longest such n. A repetition does not reach across a breaker (a newline, a quotation mark,
the tokens of a chat template), and breakers themselves are free.

Source: p-e-w 2024, "DRY: A modern repetition penalty that reliably prevents looping",
github.com/oobabooga/text-generation-webui/pull/5677.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxengine.sampling.extensions import LogitsProcessor, Row

MAX_MATCH = 50  # longer repetitions count as so long


def dry(logits: Float[Array, " V"], params: Mapping[str, Array], row: Row) -> Float[Array, " V"]:
    """Logits with penalties. All places and all lengths are compared at once, [MAX_MATCH, C]."""
    V, C, breakers = len(logits), len(row.tokens), params["breakers"]
    places, back = jnp.arange(C)[None, :], jnp.arange(1, MAX_MATCH + 1)[:, None]
    recent = row.tokens[jnp.clip(row.length - back, 0, C - 1)]
    before = row.tokens[jnp.clip(places - back, 0, C - 1)]
    ends = (recent != before) | (places < back) | jnp.isin(recent, breakers)
    match_len = jnp.where(ends, back - 1, MAX_MATCH).min(axis=0)

    is_free = (places[0] >= row.length) | jnp.isin(row.tokens, breakers)
    tokens = jnp.where(is_free, V, row.tokens)
    longest = jnp.zeros(V, match_len.dtype).at[tokens].max(match_len, mode="drop")
    excess = longest - params["allowed_length"]
    penalty = params["multiplier"] * params["base"] ** excess.astype(logits.dtype)
    return jnp.where((longest > 0) & (excess >= 0), logits - penalty, logits)


def processor(breakers: Sequence[int] = ()) -> LogitsProcessor:
    """With the ids of tokens that end a repetition; a request may bring as many others."""
    params = {
        "multiplier": 0.8,
        "base": 1.75,
        "allowed_length": 2,
        "breakers": np.array(breakers, np.int32),
    }
    return LogitsProcessor(function=dry, params=params)
