"""The device programs, pure: `extend` runs the model once over ragged rows, `decode` several times
over rows of one token, and both draw next tokens. `read` and `draw` are one pass and its draw
apart, for the host to say in between what may be drawn. `embed` draws nothing. They know arrays by
slot, and neither requests nor how they are compiled.

A step's tokens never come from the host: row by row it reads them from the history of its slot, and
writes the token it drew behind them. So a prompt, a chunk, decoding rows and any mixture of them
are one program, and a decode program goes on by itself for as many steps as it was made for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.hidden_states import WantedStates
from jaxengine.logprobs import Told, Wanted
from jaxengine.models.embedder import EmbeddingModel
from jaxengine.models.interface import Batch, KVCache, Model, rows_of
from jaxengine.models.taps import Place, Taps
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.request_state import RequestState, Settings
from jaxengine.sampling import (
    SamplingState,
    adjust,
    allow_only,
    logprobs,
    logprobs_by_blocks,
    sample,
)
from jaxengine.sampling.extensions import Row

NUM_ROW_FIELDS = 5


class RowInputs(NamedTuple):
    """The whole host input of a launch, `[B, NUM_ROW_FIELDS]` when packed; padding rows have
    `query_lens` 0."""

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]  # position of the first query token
    query_lens: Int[Array, " B"]
    new_pages: Int[Array, " B"]  # the next page that the row comes to need; 0 for none
    num_draws: Int[Array, " B"]  # tokens to draw and to append; 0 inside of a prompt


class States(NamedTuple):
    """Hidden states at `n` places of the forward pass."""

    last: Float[Array, "steps n B D"]  # of each row's last token
    of_inputs: Float[Array, "n T D"] | None  # of all tokens


class Outputs(NamedTuple):
    """What the host reads of a launch."""

    drawn: Int[Array, "steps B"]  # -1 where logits are not finite
    of_drawn: Told | None = None  # of [steps B], where wanted
    of_inputs: Told | None = None  # of [T]: at each token, of the one behind it
    states: States | None = None
    embeddings: Float32[Array, "B E"] | None = None


class Asked(NamedTuple):
    """What is wanted to know of distributions."""

    wanted: Wanted  # static
    ids: Int[Array, "B n"]  # tokens that each row asks about
    is_raw: bool  # of drawn tokens: of the model's own logits, before any adjustment; static


def structure_of_made(
    part: str, wanted: Wanted | None, states: WantedStates | None
) -> tuple[Any, ...]:
    """What a step gives beside cache and state, with some leaf in place of each array."""
    some: Any = 0
    told = None if wanted is None else Told(some, some, some, some)
    of_inputs = told if wanted is not None and wanted.of_inputs else None
    seen = None if states is None else States(some, some if states.of_inputs else None)
    if part == "adjust":
        return (some,)
    if part in ("draw", "choose"):
        return (Outputs(some, told),)
    if part == "read":
        return some, Outputs(some, None, of_inputs, seen)
    if part == "embed":
        return (Outputs(some, None, None, seen, some),)
    return (Outputs(some, told, of_inputs, seen),)


class Options(NamedTuple):
    """What a program is made for, beside its size."""

    asked: Asked | None = None
    states: WantedStates | None = None  # static
    functions: Functions = NO_FUNCTIONS
    kernels: Kernels = XLA


PLAIN = Options()


def extend(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_tokens: int,
    options: Options = PLAIN,
) -> tuple[KVCache, RequestState, Outputs]:
    """One pass over `num_tokens` flat tokens, and the token drawn for each row."""
    cache, state, logits, told = read(
        model, cache, state, packed_rows, num_tokens=num_tokens, options=options
    )
    state, drawn = draw(state, packed_rows, logits, options=options)
    return cache, state, told._replace(drawn=drawn.drawn, of_drawn=drawn.of_drawn)


def read(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_tokens: int | None,
    options: Options = PLAIN,
) -> tuple[KVCache, RequestState, Float32[Array, "B V"], Outputs]:
    """The first part of a step: one pass over `num_tokens` flat tokens, or over one token of each
    row where that is None, the logits behind each row, and what is wanted to know of its tokens."""
    rows, state = _begin(cache, state, packed_rows)
    page_table, settings = _of_rows(state, rows)
    is_active = rows.query_lens > 0
    if num_tokens is None:
        batch = _decode_batch(state.tokens, page_table, settings.sampling, rows, is_active, 0)
    else:
        batch = _ragged_batch(state.tokens, page_table, settings.sampling, rows, num_tokens)
    hidden, cache, states = _pass(model, batch, cache, settings, options)
    of_inputs = _tell_inputs(model, hidden, state.tokens, rows, batch, options.asked)
    if batch.query_starts is not None:
        hidden = hidden[jnp.maximum(batch.query_starts + batch.query_lens - 1, 0)]
    with jax.named_scope("logits"):
        logits = model.logits(hidden)
    nothing_drawn = jnp.zeros((0, len(rows.slots)), jnp.int32)
    states = states and states._replace(last=states.last[None])
    return cache, state, logits, Outputs(nothing_drawn, None, of_inputs, states)


def embed(
    model: EmbeddingModel,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_tokens: int,
    options: Options = PLAIN,
) -> tuple[KVCache, RequestState, Outputs]:
    """One pass over `num_tokens` flat tokens, and the embedding of each row that ends in it."""
    rows, state = _begin(cache, state, packed_rows)
    page_table, settings = _of_rows(state, rows)
    batch = _ragged_batch(state.tokens, page_table, settings.sampling, rows, num_tokens)
    hidden, cache, states = _pass(model, batch, cache, settings, options)
    states = states and states._replace(last=states.last[None])
    nothing_drawn = jnp.zeros((0, len(rows.slots)), jnp.int32)
    with jax.named_scope("embed"):
        embeddings = model.embedder(model, hidden, batch)
    return cache, state, Outputs(nothing_drawn, None, None, states, embeddings)


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
    rows = _unpacked(packed_rows)
    sampling, lengths = _of_rows(state, rows)[1].sampling, rows.starts + rows.query_lens
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
    rows = _unpacked(packed_rows)
    settings, lengths = _of_rows(state, rows)[1], rows.starts + rows.query_lens
    draws = rows.num_draws > 0
    state, *told = _choose(state, settings, rows, lengths, draws, adjusted, logits, options)
    drawn, of_drawn = jax.tree.map(lambda leaf: leaf[None], tuple(told))
    return state, Outputs(drawn, of_drawn)


def decode(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_steps: int,
    options: Options = PLAIN,
) -> tuple[KVCache, RequestState, Outputs]:
    """`num_steps` tokens of each row, one after the other, of those rows that want so many.

    A row stops early once it has drawn `num_draws`; what stands behind these in the result, and
    what a row draws after an end-of-sequence token, is for the caller to drop.
    """
    rows, state = _begin(cache, state, packed_rows)
    page_table, settings = _of_rows(state, rows)  # the same in every step, so read before the loop

    def advance(step, carry):
        cache, tokens, memory, told = carry
        # A row that draws nothing is the end of a prompt whose continuation nobody wants.
        is_active = (rows.query_lens > 0) & (step < jnp.maximum(rows.num_draws, 1))
        batch = _decode_batch(tokens, page_table, settings.sampling, rows, is_active, step)
        hidden, cache, states = _pass(model, batch, cache, settings, options)
        with jax.named_scope("logits"):
            logits = model.logits(hidden)
        adjusted = adjust(logits, settings.sampling, tokens, rows.slots, batch.kv_lens)
        now = state._replace(tokens=tokens, memory=memory)
        draws = is_active & (rows.num_draws > 0)
        now, *new = _choose(now, settings, rows, batch.kv_lens, draws, adjusted, logits, options)
        new = (*new, states and states.last)
        told = jax.tree.map(lambda all, one: all.at[step].set(one), told, new)
        return cache, now.tokens, now.memory, told

    nothing = _nothing_told(num_steps, len(packed_rows), options)
    if options.states is not None:
        is_active = rows.query_lens > 0
        batch = _decode_batch(state.tokens, page_table, settings.sampling, rows, is_active, 0)
        shapes = jax.eval_shape(lambda: _pass(model, batch, cache, settings, options)[2])
        nothing = (*nothing[:2], jnp.zeros((num_steps, *shapes.last.shape), shapes.last.dtype))
    carry = cache, state.tokens, state.memory, nothing
    carry = advance(0, carry) if num_steps == 1 else lax.fori_loop(0, num_steps, advance, carry)
    cache, tokens, memory, (drawn, of_drawn, states) = carry
    told = Outputs(drawn, of_drawn, None, None if states is None else States(states, None))
    return cache, state._replace(tokens=tokens, memory=memory), told


def _nothing_told(
    num_steps: int, num_rows: int, options: Options
) -> tuple[Int[Array, "steps B"], Told | None, None]:
    """What `_choose` tells, in place of each step's."""
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
    return drawn, of_drawn, None


def _unpacked(packed_rows: Int[Array, "B fields"]) -> RowInputs:
    return RowInputs(*(packed_rows[:, field] for field in range(NUM_ROW_FIELDS)))


def _begin(
    cache: KVCache, state: RequestState, packed_rows: Int[Array, "B fields"]
) -> tuple[RowInputs, RequestState]:
    """The rows unpacked, their new pages in the table."""
    rows, page_table = _unpacked(packed_rows), state.page_table
    if not cache:
        return rows, state
    # The page that begins at the row's first token, or at the next position where one begins.
    page_size = cache[0].shape[3]
    index = jnp.where(rows.new_pages > 0, -(-rows.starts // page_size), page_table.shape[1])
    page_table = page_table.at[rows.slots, index].set(rows.new_pages, mode="drop")
    return rows, state._replace(page_table=page_table)


def _of_rows(state: RequestState, rows: RowInputs) -> tuple[Int[Array, "B P"], Settings]:
    settings = jax.tree.map(lambda leaf: leaf[rows.slots], state.settings)
    return state.page_table[rows.slots], settings


def _pass(
    model: Model, batch: Batch, cache: KVCache, settings: Settings, options: Options
) -> tuple[Float[Array, "T D"], KVCache, States | None]:
    """The final hidden states of all tokens, and those asked for of each row's last."""
    wanted = options.states
    places = [] if wanted is None else [Place(*place) for place in wanted.places]
    taps = Taps(options.functions.edits(batch, settings.choices, len(cache)), places)
    hidden, new_cache = model(batch, cache, options.kernels, taps)
    assert new_cache is not None, "a model given a cache returns one"
    if wanted is None:
        return hidden, new_cache, None
    values = jnp.stack([taps.values[place] for place in places])
    last = values
    if batch.query_starts is not None:
        last = values[:, jnp.maximum(batch.query_starts + batch.query_lens - 1, 0)]
    return hidden, new_cache, States(last, values if wanted.of_inputs else None)


def _tell_inputs(
    model: Model,
    hidden: Float[Array, "T D"],
    tokens: Int[Array, "R C"],
    rows: RowInputs,
    batch: Batch,
    asked: Asked | None,
) -> Told | None:
    if asked is None or not asked.wanted.of_inputs:
        return None
    row = jnp.minimum(batch.rows, len(rows.slots) - 1)  # of padding nobody reads anything
    return logprobs_by_blocks(
        hidden,
        model.logits,
        tokens.at[rows.slots[row], batch.positions + 1].get(mode="clip"),
        asked.ids[row],
        asked.wanted.top,
    )


def _choose(
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


def _decode_batch(
    tokens: Int[Array, "R C"],
    page_table: Int[Array, "B P"],
    sampling: SamplingState,
    rows: RowInputs,
    is_active: Bool[Array, " B"],
    step: Int[Array, ""] | int,
) -> Batch:
    B = len(rows.slots)
    positions = jnp.where(is_active, rows.starts + step, 0)
    return Batch(
        tokens=jnp.where(is_active, tokens[rows.slots, positions], 0),
        positions=positions,
        rows=jnp.where(is_active, jnp.arange(B, dtype=jnp.int32), B),
        query_starts=None,
        query_lens=is_active.astype(jnp.int32),
        kv_lens=jnp.where(is_active, positions + 1, 0),
        prompt_lens=sampling.prompt_lens,
        page_table=page_table,
    )


def _ragged_batch(
    tokens: Int[Array, "R C"],
    page_table: Int[Array, "B P"],
    sampling: SamplingState,
    rows: RowInputs,
    num_tokens: int,
) -> Batch:
    query_starts = jnp.cumsum(rows.query_lens) - rows.query_lens
    row_ids = rows_of(rows.query_lens, num_tokens)
    row = jnp.minimum(
        row_ids, rows.slots.shape[0] - 1
    )  # padding tokens read some row; nobody reads them
    offset = jnp.arange(num_tokens, dtype=jnp.int32) - query_starts[row]
    is_real = row_ids < rows.slots.shape[0]
    positions = jnp.where(is_real, rows.starts[row] + offset, 0)
    return Batch(
        tokens=jnp.where(is_real, tokens[rows.slots[row], positions], 0),
        positions=positions,
        rows=row_ids,
        query_starts=query_starts,
        query_lens=rows.query_lens,
        kv_lens=rows.starts + rows.query_lens,
        prompt_lens=sampling.prompt_lens,
        page_table=page_table,
    )
