"""The second part of a step: from the logits behind each row to tokens that join the histories. In
parts of its own, for the host to say in between what logits are to be."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from jaxengine.launch import PLAIN, Options, Outputs, RowInputs, of_rows, unpacked
from jaxengine.logprobs import Told
from jaxengine.request_state import RequestState, Settings
from jaxengine.sampling import SamplingState, adjust, allow_only, logprobs, sample
from jaxengine.sampling.extensions import Row


def draw(
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    logits: Float32[Array, "B V"],
    masks: Int32[Array, "B words"] | None = None,
    *,
    options: Options = PLAIN,
) -> tuple[RequestState, Outputs]:
    """The second part of a step: a token for each row that draws, of those that its mask allows."""
    adjusted = adjusted_logits(state, packed_rows, logits, masks)
    return choose(state, packed_rows, adjusted, logits, options=options)


def adjusted_logits(
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    logits: Float32[Array, "B V"],
    masks: Int32[Array, "B words"] | None,
) -> Float32[Array, "B V"]:
    """The beginning of `draw`: logits with penalties, bans and biases, -inf where masks say so."""
    rows = unpacked(packed_rows)
    sampling, lengths = of_rows(state, rows)[1].sampling, rows.starts + rows.query_lens
    with jax.named_scope("adjust"):
        logits = adjust(logits, sampling, state.tokens, rows.slots, lengths)
        return logits if masks is None else allow_only(logits, masks)


def choose(
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    adjusted: Float32[Array, "B V"],
    logits: Float32[Array, "B V"],
    *,
    options: Options = PLAIN,
) -> tuple[RequestState, Outputs]:
    """The rest of `draw`; the logits are those of the model."""
    rows = unpacked(packed_rows)
    settings, lengths = of_rows(state, rows)[1], rows.starts + rows.query_lens
    draws = rows.num_draws > 0
    state, *told = choose_tokens(state, settings, rows, lengths, draws, adjusted, logits, options)
    drawn, of_drawn = jax.tree.map(lambda leaf: leaf[None], tuple(told))
    return state, Outputs(drawn, of_drawn)


def choose_tokens(
    state: RequestState,
    settings: Settings,
    rows: RowInputs,
    lengths: Int[Array, " B"],
    draws: Bool[Array, " B"],
    adjusted: Float32[Array, "B V"],
    logits: Float32[Array, "B V"],
    options: Options,
) -> tuple[RequestState, Int[Array, " B"], Told | None]:
    """One token drawn for each row and appended to the histories of those that want it, and what is
    wanted to know of what it was drawn from."""
    tokens, sampling, kernels = state.tokens, settings.sampling, options.kernels
    how: Any = dict(implementation=kernels.sampling, interpret=kernels.interpret)
    with jax.named_scope("sample"):
        adjusted, drawn, memory = options.functions.choose(
            adjusted,
            lambda: _seen(tokens, sampling, rows, lengths),
            settings.choices,
            jax.tree.map(lambda leaf: leaf[rows.slots], state.memory),
            lambda logits: sample(logits, sampling, lengths, **how),
        )
    of_drawn = None
    if options.asked is not None:
        asked = options.asked
        if not asked.is_raw:
            is_greedy = sampling.temperature == 0
            logits = adjusted / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
        of_drawn = logprobs(logits, drawn, asked.ids, asked.wanted.top)
    # A row that does not draw writes nowhere: its next token is known and already in the history.
    target = jnp.where(draws, lengths, tokens.shape[1])
    tokens = tokens.at[rows.slots, target].set(jnp.maximum(drawn, 0), mode="drop")
    # The same holds for what is remembered of it.
    slots = jnp.where(draws, rows.slots, len(tokens))
    keep = lambda all_rows, new: all_rows.at[slots].set(new, mode="drop")
    memory = jax.tree.map(keep, state.memory, memory)
    return state._replace(tokens=tokens, memory=memory), drawn, of_drawn


def _seen(
    tokens: Int[Array, "R C"],
    sampling: SamplingState,
    rows: RowInputs,
    lengths: Int[Array, " B"],
) -> Row:
    """What registered functions see of the rows."""
    keys = jax.random.wrap_key_data(sampling.seed, impl="threefry2x32")
    return Row(
        tokens=tokens[rows.slots],
        length=lengths,
        prompt_len=sampling.prompt_lens,
        key=jax.vmap(jax.random.fold_in)(keys, lengths),
        sampling=sampling,
    )


def nothing_told(
    num_steps: int, num_rows: int, options: Options
) -> tuple[Int[Array, "steps B"], Told | None]:
    """In place of what `choose_tokens` tells of each step."""
    drawn = jnp.zeros((num_steps, num_rows), jnp.int32)
    of_drawn = None
    if options.asked is not None:
        wanted, ids = options.asked.wanted, options.asked.ids
        of_drawn = Told(
            of_token=jnp.zeros(drawn.shape),
            top=jnp.zeros((*drawn.shape, wanted.top)),
            top_ids=jnp.zeros((*drawn.shape, wanted.top), jnp.int32),
            of_ids=jnp.zeros((*drawn.shape, ids.shape[1])),
        )
    return drawn, of_drawn
