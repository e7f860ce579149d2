"""The device programs, pure: `extend` runs the model once over ragged rows, `decode` several times
over rows of one token, and both draw next tokens. `read` is a pass whose draw (`drawing.py`) is a
program of its own, for the host to say in between what may be drawn; `embed` draws nothing. They
know arrays by slot, and neither requests nor how they are compiled.

A step reads its tokens, row by row, from the history of the row's slot, and writes the token it
drew behind them; the few that the host alone foresaw join the history first. So a prompt, a chunk,
decoding rows and any mixture of them are one program, and a decode program goes on by itself for as
many steps as it was made for.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxengine.drawing import choose_tokens, draw, nothing_told
from jaxengine.launch import (
    PLAIN,
    Options,
    Outputs,
    RowInputs,
    States,
    of_rows,
    unpacked,
)
from jaxengine.logprobs import Told
from jaxengine.models.embedder import EmbeddingModel
from jaxengine.models.interface import Batch, KVCache, Model, last_tokens, rows_of
from jaxengine.models.taps import Place, Taps
from jaxengine.pallas_kernels.dispatch import log_normalizer
from jaxengine.request_state import RequestState, Settings
from jaxengine.sampling import SamplingState, adjust, logprobs_by_blocks, logprobs_of_some


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
    num_drawing: int | None = None,
    new_tokens: Int[Array, "B N"] | None = None,
    options: Options = PLAIN,
) -> tuple[KVCache, RequestState, Float32[Array, "drawing V"], Outputs]:
    """The first part of a step: one pass over `num_tokens` flat tokens, or over one token of each
    row where that is None, the logits behind each of the first `num_drawing` rows, and what is
    wanted to know of its tokens. The new ones join the histories before: they are the last that
    each row reads, behind -1."""
    rows, state = _begin(cache, state, packed_rows)
    if new_tokens is not None:
        state = _with_new_tokens(state, rows, new_tokens)
    page_table, settings = of_rows(state, rows)
    is_active = rows.query_lens > 0
    if num_tokens is None:
        batch = _decode_batch(state.tokens, page_table, settings.sampling, rows, is_active, 0)
        if num_drawing is not None and num_drawing < len(is_active):
            # The others are earlier tokens of these rows, which see their K and V.
            kernels = replace(options.kernels, fuses_decode=False)
            options = options._replace(kernels=kernels)
    else:
        batch = _ragged_batch(state.tokens, page_table, settings.sampling, rows, num_tokens)
    hidden, cache, states = _pass(model, batch, cache, settings, options)
    of_inputs = _tell_inputs(model, hidden, state.tokens, rows, batch, options)
    if batch.query_starts is not None:
        hidden = hidden[last_tokens(batch)]
    with jax.named_scope("logits"):
        logits = model.logits(hidden[:num_drawing])
    nothing_drawn = jnp.zeros((0, len(logits)), jnp.int32)
    states = states and states._replace(last=states.last[None, :, :num_drawing])
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
    page_table, settings = of_rows(state, rows)
    batch = _ragged_batch(state.tokens, page_table, settings.sampling, rows, num_tokens)
    hidden, cache, _ = _pass(model, batch, cache, settings, options)
    with jax.named_scope("embed"):
        embeddings = model.embedder(model, hidden, batch)
    nothing_drawn = jnp.zeros((0, len(rows.slots)), jnp.int32)
    return cache, state, Outputs(nothing_drawn, embeddings=embeddings)


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
    page_table, settings = of_rows(state, rows)  # the same in every step, so read before the loop

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
        now, *new = choose_tokens(
            now, settings, rows, batch.kv_lens, draws, adjusted, logits, options
        )
        new = (*new, states and states.last)
        told = jax.tree.map(lambda all, one: all.at[step].set(one), told, new)
        return cache, now.tokens, now.memory, told

    nothing = nothing_told(num_steps, len(packed_rows), options)
    unseen = _unseen(num_steps, model, cache, page_table, settings, rows, options)
    carry = cache, state.tokens, state.memory, (*nothing, unseen)
    carry = advance(0, carry) if num_steps == 1 else lax.fori_loop(0, num_steps, advance, carry)
    cache, tokens, memory, (drawn, of_drawn, states) = carry
    told = Outputs(drawn, of_drawn, None, None if states is None else States(states, None))
    return cache, state._replace(tokens=tokens, memory=memory), told


def _unseen(
    num_steps: int,
    model: Model,
    cache: KVCache,
    page_table: Int[Array, "B P"],
    settings: Settings,
    rows: RowInputs,
    options: Options,
) -> Float[Array, "steps n B D"] | None:
    """In place of the hidden states of each step."""
    if options.states is None:
        return None
    B, nobody = len(rows.slots), rows.query_lens < 0
    tokens = jnp.zeros((B + 1, 1), jnp.int32)

    def one_pass() -> States | None:
        batch = _decode_batch(tokens, page_table, settings.sampling, rows, nobody, 0)
        return _pass(model, batch, cache, settings, options)[2]

    shape = jax.eval_shape(one_pass).last
    return jnp.zeros((num_steps, *shape.shape), shape.dtype)


def _begin(
    cache: KVCache, state: RequestState, packed_rows: Int[Array, "B fields"]
) -> tuple[RowInputs, RequestState]:
    """The rows unpacked, their new pages in the table."""
    rows, page_table = unpacked(packed_rows), state.page_table
    if not cache:
        return rows, state
    # The page that begins at the row's first token, or at the next position where one begins.
    page_size = cache[0].shape[3]
    index = jnp.where(rows.new_pages > 0, -(-rows.starts // page_size), page_table.shape[1])
    page_table = page_table.at[rows.slots, index].set(rows.new_pages, mode="drop")
    return rows, state._replace(page_table=page_table)


def _with_new_tokens(
    state: RequestState, rows: RowInputs, new_tokens: Int[Array, "B N"]
) -> RequestState:
    N, nowhere = new_tokens.shape[1], state.tokens.shape[1]
    ends = rows.starts + rows.query_lens
    positions = ends[:, None] - N + jnp.arange(N, dtype=jnp.int32)[None]
    positions = jnp.where(new_tokens >= 0, positions, nowhere)
    tokens = state.tokens.at[rows.slots[:, None], positions].set(new_tokens, mode="drop")
    return state._replace(tokens=tokens)


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
    last = values if batch.query_starts is None else values[:, last_tokens(batch)]
    return hidden, new_cache, States(last, values if wanted.of_inputs else None)


def _tell_inputs(
    model: Model,
    hidden: Float[Array, "T D"],
    tokens: Int[Array, "R C"],
    rows: RowInputs,
    batch: Batch,
    options: Options,
) -> Told | None:
    asked = options.asked
    if asked is None or not asked.wanted.of_inputs:
        return None
    row = jnp.minimum(batch.rows, len(rows.slots) - 1)  # of padding nobody reads anything
    following = tokens.at[rows.slots[row], batch.positions + 1].get(mode="clip")
    if model.head is not None and not asked.wanted.ids and asked.wanted.top <= 1:
        V, D = (head := model.head[...]).shape
        if normalizer := log_normalizer(options.kernels, len(hidden), V, D, head.dtype):
            tells = batch.rows < len(rows.slots)
            tells &= batch.positions >= rows.tell_starts[row]
            tells &= batch.positions + 1 < batch.prompt_lens[row]
            return logprobs_of_some(hidden, head, following, tells, normalizer, asked.wanted.top)
    return logprobs_by_blocks(hidden, model.logits, following, asked.ids[row], asked.wanted.top)


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
        write_starts=rows.write_starts,
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
        write_starts=rows.write_starts,
    )
