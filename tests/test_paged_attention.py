"""Ragged attention over pages against float64, one sequence at a time; the other pages are NaN."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_near_exact, attention_exact, attention_naive, to_float64

from jaxengine.pallas_kernels.paged_attention import Config, paged_attention, write_kv

PAGE, HEAD = 4, 16
SMALL = Config(max_block_queries=4, min_chunk_tokens=8, max_chunk_tokens=8)
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


class Case(NamedTuple):
    """Arguments of one call, and each row's own q, k and v."""

    q: jax.Array
    cache: jax.Array
    ragged: dict[str, jax.Array]
    sequences: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def make_case(
    rng: np.random.Generator,
    lens: list[tuple[int, int]],
    *,
    heads: str = "gqa",
    dtype=jnp.float32,
    padding: tuple[int, int] = (0, 0),
    page_size: int = PAGE,
    fill: float = np.nan,
) -> Case:
    """Rows of (query_len, kv_len) tokens over shuffled pages, with (tokens, rows) of padding.

    Whatever no sequence owns holds `fill`: foreign pages, page 0, the rest of each last page.
    """
    N, K = HEADS[heads]
    row_pages = [-(-kv_len // page_size) for _, kv_len in lens]
    num_pages = 2 + sum(row_pages)
    free = list(rng.permutation(np.arange(1, num_pages)))
    B, P = len(lens) + padding[1], max(row_pages) + 3
    cache = np.full((num_pages, 2, K, page_size, HEAD), fill, np.float32)
    page_table = np.zeros((B, P), np.int32)
    sequences = []
    for row, (query_len, kv_len) in enumerate(lens):
        q, k, v = (
            np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
            for shape in ((query_len, N, HEAD), (kv_len, K, HEAD), (kv_len, K, HEAD))
        )
        sequences.append((q, k, v))
        page_table[row, : row_pages[row]] = [free.pop() for _ in range(row_pages[row])]
        page, offset = (
            page_table[row, np.arange(kv_len) // page_size],
            np.arange(kv_len) % page_size,
        )
        cache[page, 0, :, offset], cache[page, 1, :, offset] = k, v
    query_lens = np.array([q for q, _ in lens] + [0] * padding[1], np.int32)
    kv_lens = np.array([s for _, s in lens] + [0] * padding[1], np.int32)
    rows = np.repeat(np.arange(B), query_lens)
    starts = np.cumsum(query_lens) - query_lens
    positions = np.arange(len(rows)) - (starts - (kv_lens - query_lens))[rows]
    q = np.concatenate([q for q, _, _ in sequences] + [np.full((padding[0], N, HEAD), fill)])
    ragged = dict(
        rows=np.append(rows, np.full(padding[0], B)),
        positions=np.append(positions, np.zeros(padding[0])),
        query_starts=starts,
        query_lens=query_lens,
        kv_lens=kv_lens,
        page_table=page_table,
    )
    ragged = {name: jnp.asarray(value, jnp.int32) for name, value in ragged.items()}
    return Case(jnp.asarray(q, dtype), jnp.asarray(cache, dtype), ragged, sequences)


def attend(case: Case, *, window: int | None = None, config: Config = SMALL) -> jax.Array:
    call = jax.jit(paged_attention, static_argnames=("scale", "window", "config"))
    return call(case.q, case.cache, **case.ragged, scale=HEAD**-0.5, window=window, config=config)


def check(case: Case, *, window: int | None = None, config: Config = SMALL) -> np.ndarray:
    """Compares every row with float64, and padding with zero."""
    out = np.asarray(attend(case, window=window, config=config))
    how: dict[str, Any] = dict(scale=HEAD**-0.5, window=window)
    exact = [attention_exact(*s, **how) for s in case.sequences]
    naive = [attention_naive(*s, **how) for s in case.sequences]
    num_tokens = sum(len(e) for e in exact)
    assert_near_exact(out[:num_tokens], np.concatenate(exact), np.concatenate(naive))
    assert not to_float64(out[num_tokens:]).any()
    return out


HOSTILE = [1, PAGE - 1, PAGE, PAGE + 1, 7, 13, 31, 97]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_of_hostile_lengths_is_exact(rng, heads, dtype):
    check(make_case(rng, [(n, n) for n in HOSTILE], heads=heads, dtype=dtype, padding=(5, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("heads", HEADS)
def test_decode_of_hostile_lengths_is_exact(rng, heads, dtype):
    check(make_case(rng, [(1, n) for n in HOSTILE], heads=heads, dtype=dtype))


@pytest.mark.parametrize("window", [None, 1, 3, PAGE, 17])
def test_mixed_rows_with_a_window_are_exact(rng, window):
    lens = [(1, 1), (1, 97), (5, 5), (7, 40), (1, 8), (29, 90), (2, 2)]
    check(make_case(rng, lens, padding=(3, 1)), window=window)


@pytest.mark.parametrize("lens", [[(1, 1)], [(61, 61)], [(16, 61)], [(1, 61)]])
def test_a_single_row_is_exact(rng, lens):
    check(make_case(rng, lens))


def test_default_tuning_is_exact_over_several_chunks(rng):
    lens = [(1, 700), (150, 1201), (33, 33), (1, 1)]
    case = make_case(rng, lens, page_size=64, padding=(7, 0))
    check(case, config=Config())
    check(case, config=Config(), window=100)


def test_more_rows_than_tokens_are_fine(rng):
    check(make_case(rng, [(1, 9), (2, 2)], padding=(0, 6)))


def test_only_padding_gives_zeros(rng):
    case = make_case(rng, [(1, 5)], padding=(2, 1))
    ragged = case.ragged | dict(
        rows=jnp.full(3, 2, jnp.int32),
        query_lens=jnp.zeros(2, jnp.int32),
        kv_lens=jnp.zeros(2, jnp.int32),
    )
    assert not np.asarray(attend(case._replace(ragged=ragged))).any()


def test_chunked_prefill_equals_prefill_at_once(rng):
    [(q, _, _)] = (whole := make_case(rng, [(61, 61)])).sequences
    out = check(whole)
    for start, end in [(0, 1), (1, 17), (17, 30), (30, 61)]:
        ragged = whole.ragged | dict(
            rows=jnp.zeros(end - start, jnp.int32),
            positions=jnp.arange(start, end, dtype=jnp.int32),
            query_lens=jnp.full(1, end - start, jnp.int32),
            kv_lens=jnp.full(1, end, jnp.int32),
        )
        chunk = attend(whole._replace(q=jnp.asarray(q[start:end]), ragged=ragged))
        np.testing.assert_allclose(chunk, out[start:end], atol=2e-6, rtol=2e-6)


def test_pages_in_reverse_order_and_shared_by_rows_are_read_alike(rng):
    case = make_case(rng, [(3, 29)])
    order = case.ragged["page_table"][0]
    flipped = case.cache[::-1]  # the same content behind descending page ids
    table = jnp.where(jnp.arange(len(order)) < 8, len(flipped) - 1 - order, 0)
    twice = dict(
        rows=jnp.asarray([0, 0, 0, 1, 1, 1], jnp.int32),
        positions=jnp.tile(case.ragged["positions"], 2),
        query_starts=jnp.asarray([0, 3], jnp.int32),
        query_lens=jnp.full(2, 3, jnp.int32),
        kv_lens=jnp.full(2, 29, jnp.int32),
        page_table=jnp.stack([table, table]),
    )
    out = attend(Case(jnp.tile(case.q, (2, 1, 1)), flipped, twice, []))
    np.testing.assert_array_equal(out[:3], out[3:])
    np.testing.assert_allclose(out[:3], check(case), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_a_row_does_not_depend_on_its_neighbours(rng, window):
    lens = [(1, 9), (7, 7), (3, 80), (1, 1)]
    case = make_case(rng, lens)
    out = check(case, window=window)
    starts, ends = np.asarray(case.ragged["query_starts"]), np.cumsum([q for q, _ in lens])
    for row in range(len(lens)):
        alone = dict.fromkeys(("query_lens", "kv_lens"))
        for name in alone:
            alone[name] = jnp.where(jnp.arange(len(lens)) == row, case.ragged[name], 0)
        rows = jnp.where(case.ragged["rows"] == row, row, len(lens))
        again = attend(case._replace(ragged=case.ragged | alone | {"rows": rows}), window=window)
        np.testing.assert_array_equal(again[starts[row] : ends[row]], out[starts[row] : ends[row]])


def test_what_else_the_cache_holds_does_not_matter(rng):
    lens = [(1, 9), (7, 7), (3, 80), (1, 1)]
    results = [
        attend(make_case(np.random.default_rng(1), lens, fill=fill, padding=(2, 1)), window=11)
        for fill in (0.0, np.nan, np.inf, 1e30)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_pages_before_the_window_are_not_read(rng):
    case = make_case(rng, [(2, 61)])
    out = attend(case, window=9)
    table = case.ragged["page_table"].at[0, : (61 - 2 - 9) // PAGE].set(0)
    again = attend(case._replace(ragged=case.ragged | {"page_table": table}), window=9)
    np.testing.assert_array_equal(again, out)


def memory_of(lowered: jax.stages.Lowered) -> Any:
    return lowered.compile().memory_analysis()


def test_memory_does_not_grow_with_the_context(rng):
    def temporary_bytes(num_pages: int) -> int:
        case = make_case(rng, [(40, 64), (1, 64)])
        table = jnp.zeros((2, num_pages), jnp.int32)
        call = jax.jit(paged_attention, static_argnames=("scale", "window"))
        ragged = case.ragged | {"page_table": table}
        lowered = call.lower(case.q, case.cache, **ragged, scale=1.0, window=None)
        return memory_of(lowered).temp_size_in_bytes

    assert temporary_bytes(8192) - temporary_bytes(2048) <= 2 * 4 * 4 * (8192 - 2048)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_writing_puts_each_token_in_its_place_and_drops_padding(rng, dtype):
    cache = jnp.asarray(rng.standard_normal((5, 2, 3, PAGE, HEAD)), dtype)
    k, v = (jnp.asarray(rng.standard_normal((4, 3, HEAD)), dtype) for _ in range(2))
    page_ids, offsets = np.array([4, 1, 5, 9]), np.array([0, 3, 0, 0])
    expected = np.asarray(cache).copy()
    for token in range(2):
        expected[page_ids[token], 0, :, offsets[token]] = k[token]
        expected[page_ids[token], 1, :, offsets[token]] = v[token]
    written = write_kv(cache, k, v, jnp.asarray(page_ids), jnp.asarray(offsets))
    np.testing.assert_array_equal(written, expected)


def test_a_cache_may_be_wider_than_the_queries(rng):
    case = make_case(rng, [(1, 9), (7, 21)], dtype=jnp.bfloat16)
    check(case._replace(cache=case.cache.astype(jnp.float32)))


def copies_on_scatter() -> bool:
    """XLA before the one of JAX 0.12 widens bfloat16 for a scatter on the CPU."""
    version = tuple(map(int, jax.__version__.split(".")[:2]))
    return jax.default_backend() == "cpu" and version < (0, 12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_writing_into_a_donated_cache_copies_nothing(dtype):
    if dtype == jnp.bfloat16 and copies_on_scatter():
        pytest.skip("this XLA widens bfloat16 for a scatter on the CPU: use a float32 cache there")
    cache = jnp.zeros((512, 2, 2, 16, 64), dtype)
    new = jnp.zeros((8, 2, 64), dtype)
    index = jnp.zeros(8, jnp.int32)
    write = jax.jit(write_kv, donate_argnums=0)
    memory = memory_of(write.lower(cache, new, new, index, index))
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 100
