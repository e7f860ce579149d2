"""What changes the logits of single tokens: penalties for what a row has already generated, the ban
on ending too early, and biases. It knows nothing of temperature and filters, which come later.

Each stage is skipped at run time if no row asks for it, and leaves a row that does not ask as it
is, to the last bit.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

from jaxengine.sampling.state import NO_TOKEN, SamplingState

HISTORY_CHUNK = 256


def adjust(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> Float32[Array, "B V"]:
    """Logits with penalties, then the ban on early stops, then biases."""
    logits = penalize(logits, params, history, slots, lengths)
    logits = forbid_early_stop(logits, params, lengths)
    return add_biases(logits, params)


def penalize(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> Float32[Array, "B V"]:
    """Logits minus frequency_penalty x count and presence_penalty x (count > 0), then divided by
    repetition_penalty if positive and multiplied by it if negative, for generated tokens.

    Source: the additive ones OpenAI's API; repetition Keskar et al. 2019, arXiv:1909.05858.
    """
    asks = (params.frequency_penalty != 0) | (params.presence_penalty != 0)
    asks |= params.repetition_penalty != 1

    def apply(logits: Array) -> Array:
        starts = jnp.where(asks, params.prompt_lens, lengths)
        counts = count_tokens(history, slots, starts, lengths, logits.shape[1])
        seen = counts > 0
        lower = params.frequency_penalty[:, None] * counts.astype(jnp.float32)
        lower += jnp.where(seen, params.presence_penalty[:, None], 0)
        lowered = logits - lower
        factor = params.repetition_penalty[:, None]
        repeated = jnp.where(lowered > 0, lowered / factor, lowered * factor)
        return jnp.where(seen, repeated, logits)

    return lax.cond(asks.any(), apply, lambda logits: logits, logits)


def count_tokens(
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    starts: Int[Array, " B"],
    ends: Int[Array, " B"],
    V: int,
) -> Int32[Array, "B V"]:
    """How often each token stands in `[starts, ends)` of `history[slot]`.

    Works through the columns from the smallest start to the largest end, a chunk at a time: the
    rows' whole histories are never gathered.
    """
    B, C = slots.shape[0], history.shape[1]
    width = min(HISTORY_CHUNK, C)
    rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, width))

    def add_chunk(chunk: Int[Array, ""], counts: Int32[Array, "B V"]) -> Int32[Array, "B V"]:
        start = jnp.minimum(chunk * width, C - width)  # the last chunk overlaps the one before
        place = (start + jnp.arange(width))[None, :]
        counted = (place >= starts[:, None]) & (place < ends[:, None]) & (place >= chunk * width)
        columns = lax.dynamic_slice_in_dim(history, start, width, axis=1)[slots]
        columns = jnp.where(counted & (columns >= 0), columns, NO_TOKEN)
        return counts.at[rows, columns].add(1, mode="drop")

    first = jnp.min(jnp.where(starts < ends, starts, C)) // width
    last = -(-jnp.max(jnp.where(starts < ends, ends, 0)) // width)
    return lax.fori_loop(first, last, add_chunk, jnp.zeros((B, V), jnp.int32))


def forbid_early_stop(
    logits: Float32[Array, "B V"], params: SamplingState, lengths: Int[Array, " B"]
) -> Float32[Array, "B V"]:
    """Logits with the ids that end a row at -inf until its `min_new_tokens` are out."""
    asks = lengths - params.prompt_lens < params.min_new_tokens

    def apply(logits: Array) -> Array:
        banned = jnp.where(asks[:, None] & (params.stop_ids >= 0), params.stop_ids, NO_TOKEN)
        rows = jnp.arange(len(asks))[:, None]
        return logits.at[rows, banned].set(-jnp.inf, mode="drop")

    return lax.cond(asks.any(), apply, lambda logits: logits, logits)


def add_biases(logits: Float32[Array, "B V"], params: SamplingState) -> Float32[Array, "B V"]:
    asks: Bool[Array, ""] = (params.bias_ids != NO_TOKEN).any()

    def apply(logits: Array) -> Array:
        rows = jnp.arange(len(logits))[:, None]
        return logits.at[rows, params.bias_ids].add(params.bias_values, mode="drop")

    return lax.cond(asks, apply, lambda logits: logits, logits)
