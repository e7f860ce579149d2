"""What the engine and a model family say to each other: a batch of ragged tokens, the paged KV
cache, the two calls a model answers, and what fills its parameters. It knows no requests.

Dimensions, here and everywhere: `B` rows, `T` query tokens (flat over rows), `S` key/value tokens,
`D` model, `N` query heads, `K` kv heads, `G`=N/K, `H` head size, `F` mlp, `V` vocabulary,
`L` layers, `P` page-table entries per row.
"""

from types import EllipsisType
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxengine.models.taps import Taps
from jaxengine.pallas_kernels.dispatch import XLA, Kernels

LayerCache = Float[Array, "pages 2 K page_size H"]
"""Keys ([:, 0]) and values ([:, 1]) of one layer. Page 0 belongs to nobody: unused page-table
entries point at it, and nothing that is read from it survives a length mask."""

KVCache = tuple[LayerCache, ...]
"""One `LayerCache` per layer; donated to each step and returned by it."""


class Batch(NamedTuple):
    """The query tokens of one step: `T` tokens of `B` rows, flat, row after row, padding last.

    A row is one sequence. Its query tokens are the last `query_lens` of its `kv_lens` tokens.

    In a decode batch every row has one token, or none, and token t is row t's: `T` equals `B`. That
    is known while a program is traced, so that kernels made for it are chosen then.
    """

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]  # place of the token in its sequence, from 0
    rows: Int[Array, " T"]  # row of the token; B for padding
    query_starts: Int[Array, " B"] | None  # index in T of the row's first query token; None: decode
    query_lens: Int[Array, " B"]  # 0 for a padding row
    kv_lens: Int[Array, " B"]  # length of the sequence, this step's tokens included
    prompt_lens: Int[Array, " B"]  # length of the prompt: `dynamic` rope scaling depends on it
    page_table: Int[Array, "B P"]  # page ids in order of position; 0 where there is none
    write_starts: Int[Array, " B"] | None = None  # positions before it have K and V in the cache


@runtime_checkable
class Model(Protocol):
    """A decoder. `cache=None` attends within the batch alone (training, tests, the naive loop)."""

    def __call__(
        self,
        batch: Batch,
        cache: KVCache | None,
        kernels: Kernels = XLA,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "T D"], KVCache | None]:
        """Final-normed hidden states of every token, and the cache with their K and V written."""
        ...

    @property
    def head(self) -> nnx.Param | None:
        """The matrix [V D] whose products with hidden states are the logits; None: they are more
        than that."""
        ...

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Float32 next-token logits; of a classifier, those of its labels."""
        ...


class Piece(NamedTuple):
    """A checkpoint tensor that fills `parameter[index]`, reshaped to the shape of that part."""

    name: str
    index: int | EllipsisType | tuple[int | slice, ...] = ...


def rows_of(query_lens: Int[Array, " B"], num_tokens: int) -> Int[Array, " T"]:
    """Row of each of `num_tokens` flat tokens; `B` for those past the last row."""
    ends = jnp.cumsum(query_lens)
    tokens = jnp.arange(num_tokens, dtype=ends.dtype)
    # All at once: the default, a binary search, would be a loop.
    rows = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
    return rows.astype(jnp.int32)


def last_tokens(batch: Batch) -> Int[Array, " B"]:
    """Index in T of each row's last query token; of a ragged batch. A padding row has some."""
    assert batch.query_starts is not None, "a ragged batch"
    return jnp.maximum(batch.query_starts + batch.query_lens - 1, 0)


def dense_batch(tokens: Int[Array, " T"]) -> Batch:
    """One row holding one whole sequence, without a cache: the form of training and of tests."""
    length = jnp.full(1, tokens.shape[0], jnp.int32)
    return Batch(
        tokens=tokens,
        positions=jnp.arange(tokens.shape[0], dtype=jnp.int32),
        rows=jnp.zeros(tokens.shape[0], jnp.int32),
        query_starts=jnp.zeros(1, jnp.int32),
        query_lens=length,
        kv_lens=length,
        prompt_lens=length,
        page_table=jnp.zeros((1, 0), jnp.int32),
    )
