"""The device programs, pure: `step` runs the model over ragged rows and draws their next tokens,
`install` puts a request's state into its slot. They know arrays by slot, and neither requests nor
how they are compiled.

A step's tokens never come from the host: row by row it reads them from the history of its slot, and
writes the token it drew behind them. So a prompt, a chunk, a decode step and any mixture are one
program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxengine.models.interface import Batch, KVCache, Model, rows_of
from jaxengine.sampling import SamplingState, sample
from jaxengine.sampling import install as install_sampling

NUM_ROW_FIELDS = 5


class RowInputs(NamedTuple):
    """A step's whole host input, `[B, NUM_ROW_FIELDS]` when packed; padding rows have `query_lens`
    0."""

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]  # position of the first query token
    query_lens: Int[Array, " B"]
    new_pages: Int[Array, " B"]  # page beginning at `starts` that the table lacks; 0 for none
    samples: Int[Array, " B"]  # whether the drawn token is the sequence's next one


class RequestState(NamedTuple):
    """What the device remembers of each slot's request; the last slot belongs to padding rows."""

    tokens: Int[Array, "R C"]  # prompt and drawn tokens, in order of position
    page_table: Int[Array, "R P"]
    sampling: SamplingState


def empty_tables(num_slots: int, context_length: int, page_size: int):
    """`tokens` and `page_table` of a `RequestState` with nothing in it (and the padding slot)."""
    num_pages = -(-context_length // page_size)
    return (
        jnp.zeros((num_slots + 1, context_length), jnp.int32),
        jnp.zeros((num_slots + 1, num_pages), jnp.int32),
    )


def step(
    model: Model,
    cache: KVCache,
    state: RequestState,
    packed_rows: Int[Array, "B fields"],
    *,
    num_tokens: int,
) -> tuple[KVCache, RequestState, Int[Array, " B"]]:
    """One pass over `num_tokens` flat tokens; the token drawn for each row, -1 where its logits are
    not finite."""
    rows = RowInputs(*(packed_rows[:, field] for field in range(NUM_ROW_FIELDS)))
    page_size = cache[0].shape[3]
    state = state._replace(page_table=_with_new_pages(state.page_table, rows, page_size))
    batch = _gather_batch(state, rows, num_tokens)
    hidden, new_cache = model(batch, cache)
    last = jnp.maximum(batch.query_starts + rows.query_lens - 1, 0)
    with jax.named_scope("logits"):
        logits = model.logits(hidden[last])
    with jax.named_scope("sample"):
        sampling = jax.tree.map(lambda leaf: leaf[rows.slots], state.sampling)
        drawn = sample(logits, sampling, state.tokens, rows.slots, batch.kv_lens)
    # A row that does not sample writes nowhere: its next token is known and already in the history.
    target = jnp.where(rows.samples == 1, batch.kv_lens, state.tokens.shape[1])
    tokens = state.tokens.at[rows.slots, target].set(jnp.maximum(drawn, 0), mode="drop")
    assert new_cache is not None, "a model given a cache returns one"
    return new_cache, state._replace(tokens=tokens), drawn


def _with_new_pages(page_table: Int[Array, "R P"], rows: RowInputs, page_size: int):
    index = jnp.where(rows.new_pages > 0, rows.starts // page_size, page_table.shape[1])
    return page_table.at[rows.slots, index].set(rows.new_pages, mode="drop")


def _gather_batch(state: RequestState, rows: RowInputs, num_tokens: int) -> Batch:
    query_starts = jnp.cumsum(rows.query_lens) - rows.query_lens
    row_ids = rows_of(rows.query_lens, num_tokens)
    row = jnp.minimum(
        row_ids, rows.slots.shape[0] - 1
    )  # padding tokens read some row; nobody reads them
    offset = jnp.arange(num_tokens, dtype=jnp.int32) - query_starts[row]
    is_real = row_ids < rows.slots.shape[0]
    positions = jnp.where(is_real, rows.starts[row] + offset, 0)
    return Batch(
        tokens=jnp.where(is_real, state.tokens[rows.slots[row], positions], 0),
        positions=positions,
        rows=row_ids,
        query_starts=query_starts,
        query_lens=rows.query_lens,
        kv_lens=rows.starts + rows.query_lens,
        prompt_lens=state.sampling.prompt_lens[rows.slots],
        page_table=state.page_table[rows.slots],
    )


def install(
    state: RequestState, packed: Int[Array, " fields"], *, num_sampling_fields: int
) -> RequestState:
    """Fills one slot from `[slot, sampling fields..., page table row..., token history row...]`."""
    slot = packed[0]
    sampling_end = 1 + num_sampling_fields
    table_end = sampling_end + state.page_table.shape[1]
    return RequestState(
        tokens=state.tokens.at[slot].set(packed[table_end:]),
        page_table=state.page_table.at[slot].set(packed[sampling_end:table_end]),
        sampling=install_sampling(state.sampling, slot, packed[1:sampling_end]),
    )
