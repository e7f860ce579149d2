"""The device programs, pure: `extend` runs the model once over ragged rows, `decode` several times
over rows of one token, and both draw next tokens; `install` puts a request's state into its slot.
They know arrays by slot, and neither requests nor how they are compiled.

A step's tokens never come from the host: row by row it reads them from the history of its slot, and
writes the token it drew behind them. So a prompt, a chunk, decoding rows and any mixture of them
are one program, and a decode program goes on by itself for as many steps as it was made for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxengine.logprobs import Told, Wanted
from jaxengine.models.interface import Batch, KVCache, Model, rows_of
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.sampling import (
    SamplingState,
    logprobs,
    logprobs_by_blocks,
    sample,
)
from jaxengine.sampling import install as install_sampling

NUM_ROW_FIELDS = 5


class RowInputs(NamedTuple):
    """The whole host input of a launch, `[B, NUM_ROW_FIELDS]` when packed; padding rows have
    `query_lens` 0."""

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]  # position of the first query token
    query_lens: Int[Array, " B"]
    new_pages: Int[Array, " B"]  # the next page that the row comes to need; 0 for none
    num_draws: Int[Array, " B"]  # tokens to draw and to append; 0 inside of a prompt


class RequestState(NamedTuple):
    """What the device remembers of each slot's request; the last slot belongs to padding rows."""

    tokens: Int[Array, "R C"]  # prompt and drawn tokens, in order of position
    page_table: Int[Array, "R P"]
    sampling: SamplingState


class Outputs(NamedTuple):
    """What the host reads of a launch."""

    drawn: Int[Array, "steps B"]  # -1 where logits are not finite
    of_drawn: Told | None = None  # of [steps B], where wanted
    of_inputs: Told | None = None  # of [T]: at each token, of the one behind it


class Asked(NamedTuple):
    """What is wanted to know of distributions."""

    wanted: Wanted  # static
    ids: Int[Array, "B n"]  # tokens that each row asks about
    is_raw: bool  # of drawn tokens: of the model's own logits, before any adjustment; static


def outputs_structure(wanted: Wanted | None) -> Outputs:
    """`Outputs` with some leaf in place of each array."""
    told = Told(0, 0, 0, 0)
    if wanted is None:
        return Outputs(0)  # type: ignore[arg-type]
    return Outputs(0, told, told if wanted.of_inputs else None)  # type: ignore[arg-type]


def empty_tables(num_slots: int, context_length: int, page_size: int):
    """`tokens` and `page_table` of a `RequestState` with nothing in it (and the padding slot)."""
    num_pages = -(-context_length // page_size)
    return (
        jnp.zeros((num_slots + 1, context_length), jnp.int32),
        jnp.zeros((num_slots + 1, num_pages), jnp.int32),
    )


def extend(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_tokens: int,
    asked: Asked | None = None,
    kernels: Kernels = XLA,
) -> tuple[KVCache, RequestState, Outputs]:
    """One pass over `num_tokens` flat tokens, and the token drawn for each row."""
    rows, state = _begin(cache, state, packed_rows)
    page_table, sampling = _of_rows(state, rows)
    batch = _ragged_batch(state.tokens, page_table, sampling, rows, num_tokens)
    hidden, new_cache = model(batch, cache, kernels)
    assert new_cache is not None, "a model given a cache returns one"
    assert batch.query_starts is not None, "a ragged batch"
    of_inputs = None
    if asked is not None and asked.wanted.of_inputs:
        row = jnp.minimum(batch.rows, len(rows.slots) - 1)  # of padding nobody reads anything
        of_inputs = logprobs_by_blocks(
            hidden,
            model.logits,
            state.tokens.at[rows.slots[row], batch.positions + 1].get(mode="clip"),
            asked.ids[row],
            asked.wanted.top,
        )
    last = hidden[jnp.maximum(batch.query_starts + batch.query_lens - 1, 0)]
    tokens, drawn, of_drawn = _draw(
        model, last, state.tokens, sampling, rows, batch.kv_lens, rows.num_draws > 0, asked, kernels
    )
    of_drawn = jax.tree.map(lambda leaf: leaf[None], of_drawn)
    return new_cache, state._replace(tokens=tokens), Outputs(drawn[None], of_drawn, of_inputs)


def decode(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_steps: int,
    asked: Asked | None = None,
    kernels: Kernels = XLA,
) -> tuple[KVCache, RequestState, Outputs]:
    """`num_steps` tokens of each row, one after the other, of those rows that want so many.

    A row stops early once it has drawn `num_draws`; what stands behind these in the result, and
    what a row draws after an end-of-sequence token, is for the caller to drop.
    """
    rows, state = _begin(cache, state, packed_rows)
    page_table, sampling = _of_rows(state, rows)  # the same in every step, so read before the loop

    def advance(step, carry):
        cache, tokens, told = carry
        # A row that draws nothing is the end of a prompt whose continuation nobody wants.
        is_active = (rows.query_lens > 0) & (step < jnp.maximum(rows.num_draws, 1))
        batch = _decode_batch(tokens, page_table, sampling, rows, is_active, step)
        draws = is_active & (rows.num_draws > 0)
        hidden, new_cache = model(batch, cache, kernels)
        assert new_cache is not None, "a model given a cache returns one"
        tokens, *new = _draw(
            model, hidden, tokens, sampling, rows, batch.kv_lens, draws, asked, kernels
        )
        told = jax.tree.map(lambda all, one: all.at[step].set(one), told, tuple(new))
        return new_cache, tokens, told

    carry = cache, state.tokens, _nothing_told(num_steps, len(packed_rows), asked)
    if num_steps == 1:
        cache, tokens, told = advance(0, carry)
    else:
        cache, tokens, told = lax.fori_loop(0, num_steps, advance, carry)
    return cache, state._replace(tokens=tokens), Outputs(*told)


def _nothing_told(
    num_steps: int, num_rows: int, asked: Asked | None
) -> tuple[Int[Array, "steps B"], Told | None]:
    """What `_draw` tells, in place of each step's."""
    drawn = jnp.zeros((num_steps, num_rows), jnp.int32)
    if asked is None:
        return drawn, None
    of_drawn = Told(
        of_token=jnp.zeros(drawn.shape),
        top=jnp.zeros((*drawn.shape, asked.wanted.top)),
        top_ids=jnp.zeros((*drawn.shape, asked.wanted.top), jnp.int32),
        of_ids=jnp.zeros((*drawn.shape, asked.ids.shape[1])),
    )
    return drawn, of_drawn


def _begin(
    cache: KVCache, state: RequestState, packed_rows: Int[Array, "B fields"]
) -> tuple[RowInputs, RequestState]:
    """The rows unpacked, their new pages in the table."""
    rows = RowInputs(*(packed_rows[:, field] for field in range(NUM_ROW_FIELDS)))
    page_size, page_table = cache[0].shape[3], state.page_table
    # The page that begins at the row's first token, or at the next position where one begins.
    index = jnp.where(rows.new_pages > 0, -(-rows.starts // page_size), page_table.shape[1])
    page_table = page_table.at[rows.slots, index].set(rows.new_pages, mode="drop")
    return rows, state._replace(page_table=page_table)


def _of_rows(state: RequestState, rows: RowInputs) -> tuple[Int[Array, "B P"], SamplingState]:
    sampling = jax.tree.map(lambda leaf: leaf[rows.slots], state.sampling)
    return state.page_table[rows.slots], sampling


def _draw(
    model: Model,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "R C"],
    sampling: SamplingState,
    rows: RowInputs,
    lengths: Int[Array, " B"],
    draws: Bool[Array, " B"],
    asked: Asked | None,
    kernels: Kernels,
) -> tuple[Int[Array, "R C"], Int[Array, " B"], Told | None]:
    """The histories, one token drawn for each row and appended to those that want it, and what is
    wanted to know of what it was drawn from."""
    with jax.named_scope("logits"):
        logits = model.logits(hidden)
    with jax.named_scope("sample"):
        drawn, adjusted = sample(
            logits,
            sampling,
            tokens,
            rows.slots,
            lengths,
            implementation=kernels.sampling,
            interpret=kernels.interpret,
        )
    of_drawn = None
    if asked is not None:
        if not asked.is_raw:
            is_greedy = sampling.temperature == 0
            logits = adjusted / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
        of_drawn = logprobs(logits, drawn, asked.ids, asked.wanted.top)
    # A row that does not draw writes nowhere: its next token is known and already in the history.
    target = jnp.where(draws, lengths, tokens.shape[1])
    tokens = tokens.at[rows.slots, target].set(jnp.maximum(drawn, 0), mode="drop")
    return tokens, drawn, of_drawn


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


class InstallInputs(NamedTuple):
    """What goes into the slots of newly admitted requests, and a stretch of each one's tokens.

    The tokens travel flat, one row's behind the other's. A row without a request has no tokens, and
    a slot that does not exist.
    """

    slots: Int[Array, " I"]
    starts: Int[Array, " I"]  # position of the first token
    num_tokens: Int[Array, " I"]
    sampling: Int[Array, "I fields"]  # as `sampling.pack` makes them
    page_table: Int[Array, "I P"]
    tokens: Int[Array, " F"]


def install(state: RequestState, new: InstallInputs) -> RequestState:
    """Fills slots. A history too long for one call comes in several, which all fill the slot."""
    row_ids = rows_of(new.num_tokens, len(new.tokens))
    row = jnp.minimum(row_ids, len(new.slots) - 1)
    offset = (
        jnp.arange(len(new.tokens), dtype=jnp.int32)
        - (jnp.cumsum(new.num_tokens) - new.num_tokens)[row]
    )
    slot = jnp.where(row_ids < len(new.slots), new.slots[row], len(state.tokens))
    return RequestState(
        tokens=state.tokens.at[slot, new.starts[row] + offset].set(new.tokens, mode="drop"),
        page_table=state.page_table.at[new.slots].set(new.page_table, mode="drop"),
        sampling=install_sampling(state.sampling, new.slots, new.sampling),
    )
