"""What changes the logits of single tokens: penalties for what a row has already generated, the ban
on ending too early, and biases. It knows nothing of temperature and filters, which come later.

What no row asks for is skipped at run time, and a row that does not ask is left as it is, to the
last bit. Every change is a scatter and nothing here is a loop, for the sake of steps in which
nobody asks: XLA skips a scatter without a copy of the logits, and a loop would not be part of the
step's CUDA graph.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

from jaxengine.sampling.state import NO_TOKEN, SamplingState


def adjust(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> Float32[Array, "B V"]:
    """Logits with penalties, then the ban on early stops, then biases.

    `history[slots]` holds each row's prompt and output so far, `lengths` of them, which is the
    position of the token to come.
    """
    penalized = asks_for_penalties(params)
    is_early = lengths - params.prompt_lens < params.min_new_tokens
    has_biases = params.bias_ids[:, 0] != NO_TOKEN  # they stand in front of the padding
    same = lambda logits: logits

    def change(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        logits = lax.cond(
            penalized.any(),
            lambda logits: penalize(logits, params, history, slots, lengths, penalized),
            same,
            logits,
        )
        return lax.cond(
            (is_early | has_biases).any(),
            lambda logits: add_biases(forbid_stop(logits, params, is_early), params),
            same,
            logits,
        )

    # A condition takes a GPU 9 us, whatever comes of it: nobody who asks for nothing waits for two.
    return lax.cond((penalized | is_early | has_biases).any(), change, same, logits)


def asks_for_penalties(params: SamplingState) -> Bool[Array, " B"]:
    additive = (params.frequency_penalty != 0) | (params.presence_penalty != 0)
    return additive | (params.repetition_penalty != 1)


def penalize(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    lengths: Int[Array, " B"],
    asks: Bool[Array, " B"],
) -> Float32[Array, "B V"]:
    """Logits minus frequency_penalty x count and presence_penalty x (count > 0), then divided by
    repetition_penalty if positive and multiplied by it if negative, for generated tokens.

    Source: the additive ones OpenAI's API; repetition Keskar et al. 2019, arXiv:1909.05858.
    """
    starts = jnp.where(asks, params.prompt_lens, lengths)
    tokens = tokens_between(history, slots, starts, lengths)
    rows = jnp.arange(len(slots))[:, None]
    counts = count_tokens(tokens, logits.shape[1]).at[rows, tokens].get(mode="clip")
    lower = params.frequency_penalty[:, None] * counts.astype(jnp.float32)
    lower += params.presence_penalty[:, None]
    lowered = logits.at[rows, tokens].get(mode="clip") - lower
    factor = params.repetition_penalty[:, None]
    repeated = jnp.where(lowered > 0, lowered / factor, lowered * factor)
    # A token that occurs twice is written twice, with the same logit.
    return logits.at[rows, tokens].set(repeated, mode="drop")


def tokens_between(
    history: Int[Array, "R C"],
    slots: Int[Array, " B"],
    starts: Int[Array, " B"],
    ends: Int[Array, " B"],
) -> Int32[Array, "B C"]:
    """`history[slot]` with NO_TOKEN outside `[starts, ends)`."""
    place = jnp.arange(history.shape[1])[None, :]
    counted = (place >= starts[:, None]) & (place < ends[:, None])
    tokens = history[slots].astype(jnp.int32)
    return jnp.where(counted & (tokens >= 0), tokens, NO_TOKEN)


def count_tokens(tokens: Int32[Array, "B C"], V: int) -> Int32[Array, "B V"]:
    """How often each token of the vocabulary occurs in each row."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), V), jnp.int32).at[rows, tokens].add(1, mode="drop")


def forbid_stop(
    logits: Float32[Array, "B V"], params: SamplingState, rows: Bool[Array, " B"]
) -> Float32[Array, "B V"]:
    """Logits with the ids that would end these rows at -inf."""
    banned = jnp.where(rows[:, None] & (params.stop_ids >= 0), params.stop_ids, NO_TOKEN)
    return logits.at[jnp.arange(len(rows))[:, None], banned].set(-jnp.inf, mode="drop")


def add_biases(logits: Float32[Array, "B V"], params: SamplingState) -> Float32[Array, "B V"]:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, params.bias_ids].add(params.bias_values, mode="drop")
