"""Batches for attention kernels, and what these must make of them. Rows of any lengths lie over
shuffled pages; what no row owns, the rest of each last page included, is NaN."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numerics import assert_near_exact, attention_exact, attention_naive, noise

MOST_COMPARED = 130


class Heads(NamedTuple):
    """What a kernel is compiled for, as far as arrays tell."""

    N: int
    K: int
    H: int
    page_size: int = 64
    dtype: Any = jnp.bfloat16


class Room(NamedTuple):
    """Sizes of arrays that several batches share, so that one program serves all."""

    tokens: int  # of queries
    kv_tokens: int  # in all
    longest: int  # of rows, in cached tokens


class Program(NamedTuple):
    """What is compiled for a GPU and then called with several batches."""

    heads: Heads
    window: int | None = None
    soft_cap: float | None = None
    rows: int = 40
    min_queries: int = 1  # rows of fewer are left out

    @property
    def masks(self) -> dict[str, Any]:
        return dict(window=self.window, soft_cap=self.soft_cap)


class Case(NamedTuple):
    """Arguments of one call, and each row's own q, k and v."""

    q: jax.Array
    cache: jax.Array
    ragged: dict[str, jax.Array]
    sequences: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def make_case(
    rng: np.random.Generator,
    lens: Sequence[tuple[int, int]],
    heads: Heads,
    *,
    room: Room | None = None,
    padding: int = 0,
    forgotten: int | None = None,
    fill: float = np.nan,
) -> Case:
    """Rows of (query_len, kv_len) tokens, and tokens of padding where no `room` is given.

    What no row owns holds `fill`. With a window that is `forgotten`, so do whole pages before it.
    """
    _, K, H, page_size, dtype = heads
    query_lens, kv_lens = np.array(lens, np.int32).T
    if room is None:
        room = Room(int(query_lens.sum()) + padding, int(kv_lens.sum()), int(kv_lens.max()))
    shapes = abstract(len(lens), heads, room)
    q, content = (noise(rng, array.shape, dtype) for array in shapes[:2])
    cache, free = np.full_like(content, fill), rng.permutation(np.arange(1, len(content)))
    page_table = np.zeros(shapes[2]["page_table"].shape, np.int32)
    q[query_lens.sum() :] = fill
    starts, sequences = np.cumsum(query_lens) - query_lens, []
    for row, (start, query_len, kv_len) in enumerate(zip(starts, *np.array(lens).T, strict=True)):
        pages, free = np.split(free, [-(-kv_len // page_size)])
        page_table[row, : len(pages)] = pages
        cache[pages] = content[pages]
        cache[pages[-1:], :, :, (kv_len - 1) % page_size + 1 :] = fill
        k, v = (content[pages, i].swapaxes(1, 2).reshape(-1, K, H)[:kv_len] for i in (0, 1))
        sequences.append((q[start : start + query_len], k, v))
        if forgotten:  # as if these pages had been given away
            page_table[row, : max(kv_len - query_len + 1 - forgotten, 0) // page_size] = 0
    ragged = dict(
        query_starts=starts, query_lens=query_lens, kv_lens=kv_lens, page_table=page_table
    )
    ragged = {name: jnp.asarray(value, jnp.int32) for name, value in ragged.items()}
    return Case(jnp.asarray(q), jnp.asarray(cache), ragged, sequences)


def abstract(rows: int, heads: Heads, room: Room) -> tuple[Any, Any, dict[str, Any]]:
    """Shapes of q, cache and what tells where the tokens of rows are."""
    N, K, H, page_size, dtype = heads
    each = jax.ShapeDtypeStruct((rows,), jnp.int32)
    pages = 2 + rows + room.kv_tokens // page_size, 1 + -(-room.longest // page_size)
    return (
        jax.ShapeDtypeStruct((room.tokens, N, H), dtype),
        jax.ShapeDtypeStruct((pages[0], 2, K, page_size, H), dtype),
        dict(
            query_starts=each,
            query_lens=each,
            kv_lens=each,
            page_table=jax.ShapeDtypeStruct((rows, pages[1]), jnp.int32),
        ),
    )


def mixed(
    rng: np.random.Generator,
    lens: Sequence[tuple[int, int]],
    num_rows: int,
    empty: tuple[int, int] = (0, 0),
) -> list[tuple[int, int]]:
    """So many rows in any order, the rest of them `empty`."""
    rows = [*lens, *[empty] * (num_rows - len(lens))]
    return [rows[i] for i in rng.permutation(num_rows)]


def compare(out: np.ndarray, case: Case, *, min_queries: int = 1, **masks: Any) -> np.ndarray:
    """Holds rows of so many query tokens against float64, all but the longest in every token.

    `masks` are window and soft cap. Returns what other rows and padding got.
    """
    __tracebackhide__ = True
    got, exact, naive, names, rest, end = [], [], [], [], [], 0
    for row, (q, k, v) in enumerate(case.sequences):
        own, end = out[end : end + len(q)], end + len(q)
        if len(q) < min_queries or not len(k):
            rest.append(own)
            continue
        some = np.unique(np.linspace(0, len(q) - 1, min(len(q), MOST_COMPARED)).astype(int))
        how = dict(scale=q.shape[2] ** -0.5, positions=some + len(k) - len(q)) | masks
        got.append(own[some])
        exact.append(attention_exact(q[some], k, v, **how))
        naive.append(attention_naive(q[some], k, v, **how))
        names += [f"token {token} of row {row}, which has {len(q)} of {len(k)}" for token in some]
    if got:
        assert_near_exact(*(np.concatenate(a) for a in (got, exact, naive)), rows=names)
    return np.concatenate([*rest, out[end:]])
