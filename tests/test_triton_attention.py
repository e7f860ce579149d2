"""The Triton attention kernels, interpreted on a CPU and real on a GPU, against float64; pages and
rows that nobody owns are NaN. And their lowering for CUDA at production shapes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from numerics import assert_near_exact, causal_mask, softmax_exact, to_float64

from jaxengine.pallas_kernels import paged_decode_triton, ragged_extend_triton
from jaxengine.pallas_kernels.paged_decode_triton import cut_into_parts, paged_decode
from jaxengine.pallas_kernels.ragged_extend_triton import ragged_extend

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
CUT = paged_decode_triton.Config(min_part=64, max_whole=64, programs=16)
SMALL = ragged_extend_triton.Config(block=16, step=32)
ON_BOTH = pytest.mark.parametrize(
    "interpret", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpreted", "real"]
)


class Heads(NamedTuple):
    N: int
    K: int
    H: int
    page_size: int = 64
    dtype: Any = jnp.float32


class Case(NamedTuple):
    """Arguments of one call, and each row's own q, k and v."""

    q: jax.Array
    cache: jax.Array
    ragged: dict[str, jax.Array]
    sequences: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def make_case(
    rng: np.random.Generator,
    lens: list[tuple[int, int]],
    heads: Heads,
    *,
    padding: int = 0,
    window: int | None = None,
    fill: float = np.nan,
) -> Case:
    """Rows of (query_len, kv_len) tokens over shuffled pages, and padding tokens. Whatever no row
    sees in whole pages, or no row owns, holds `fill`."""
    N, K, H, page_size, dtype = heads
    num_pages = 2 + sum(-(-kv_len // page_size) for _, kv_len in lens)
    free = list(rng.permutation(np.arange(1, num_pages)))
    page_table = np.zeros((len(lens), 1 + max(-(-s // page_size) for _, s in lens)), np.int32)
    cache = np.full((num_pages, 2, K, page_size, H), fill, np.float32)
    sequences = []
    for row, (query_len, kv_len) in enumerate(lens):
        shapes = (query_len, N, H), (kv_len, K, H), (kv_len, K, H)
        q, k, v = (np.asarray(jnp.asarray(rng.standard_normal(s), dtype)) for s in shapes)
        sequences.append((q, k, v))
        pages = -(-kv_len // page_size)
        page_table[row, :pages] = [free.pop() for _ in range(pages)]
        place = np.arange(kv_len)
        page, place = page_table[row, place // page_size], place % page_size
        cache[page, 0, :, place], cache[page, 1, :, place] = k, v
        if window:  # as if the pages it has left behind had been given away
            page_table[row, : max(kv_len - query_len + 1 - window, 0) // page_size] = 0
    query_lens, kv_lens = np.array(lens, np.int32).T
    ragged = dict(
        query_starts=np.cumsum(query_lens) - query_lens,
        query_lens=query_lens,
        kv_lens=kv_lens,
        page_table=page_table,
    )
    ragged = {name: jnp.asarray(value, jnp.int32) for name, value in ragged.items()}
    q = np.concatenate([q for q, _, _ in sequences] + [np.full((padding, N, H), fill)])
    return Case(jnp.asarray(q, dtype), jnp.asarray(cache, dtype), ragged, sequences)


def cap(scores: Any, soft_cap: float | None, tanh: Any) -> Any:
    return scores if soft_cap is None else soft_cap * tanh(scores / soft_cap)


def exact_attention(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    (T, N, H), (S, K, _) = q.shape, k.shape
    q, k, v = (to_float64(a) for a in (q, k, v))
    k, v = (np.repeat(a, N // K, axis=1) for a in (k, v))
    scores = cap(np.einsum("tnh,snh->nts", q, k) * H**-0.5, soft_cap, np.tanh)
    if not S:
        return np.zeros(q.shape)
    scores = np.where(causal_mask(T, S, window), scores, -np.inf)
    return np.einsum("nts,snh->tnh", softmax_exact(scores), v)


def naive_attention(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    """The textbook formula in the dtype of its inputs, with float32 softmax."""
    (T, N, H), (S, K, _) = q.shape, k.shape
    if not S:
        return np.zeros(q.shape, q.dtype)
    q, k, v = jnp.asarray(q), *(jnp.repeat(jnp.asarray(a), N // K, axis=1) for a in (k, v))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    scores = cap(einsum("tnh,snh->nts", q, k) * H**-0.5, soft_cap, jnp.tanh)
    scores = jnp.where(jnp.asarray(causal_mask(T, S, window))[None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return np.asarray(einsum("nts,snh->tnh", weights, v).astype(q.dtype))


def compare(out: Any, case: Case, **masks: Any) -> None:
    """`out` has the tokens of the rows of `case`, one after the other."""
    exact = np.concatenate([exact_attention(*s, **masks) for s in case.sequences])
    naive = np.concatenate([naive_attention(*s, **masks) for s in case.sequences])
    assert_near_exact(out, exact, naive)


def decode(case: Case, *, window=None, soft_cap=None, config=None, interpret=True) -> np.ndarray:
    call = jax.jit(
        functools.partial(
            paged_decode,
            scale=case.q.shape[2] ** -0.5,
            window=window,
            soft_cap=soft_cap,
            config=config,
            interpret=interpret,
        )
    )
    rows = {name: case.ragged[name] for name in ("kv_lens", "page_table")}
    return np.asarray(call(case.q, case.cache, **rows))


def extend(case: Case, *, window=None, soft_cap=None, config=None, interpret=True) -> np.ndarray:
    call = jax.jit(
        functools.partial(
            ragged_extend,
            scale=case.q.shape[2] ** -0.5,
            window=window,
            soft_cap=soft_cap,
            config=config,
            interpret=interpret,
        )
    )
    return np.asarray(call(case.q, case.cache, **case.ragged))


def check_decode(case: Case, *, window=None, soft_cap=None, **options: Any) -> None:
    out = decode(case, window=window, soft_cap=soft_cap, **options)
    compare(out, case, window=window, soft_cap=soft_cap)


def check_extend(case: Case, *, window=None, soft_cap=None, **options: Any) -> None:
    """Compares rows of two tokens or more; the others must be finite."""
    out = extend(case, window=window, soft_cap=soft_cap, **options)
    longer = [s for s in case.sequences if len(s[0]) > 1]
    rows = np.repeat(case.ragged["query_lens"], case.ragged["query_lens"])
    owned = out[: len(rows)]
    assert np.isfinite(to_float64(owned)).all()
    compare(owned[rows > 1], case._replace(sequences=longer), window=window, soft_cap=soft_cap)


def hostile(page_size: int) -> list[tuple[int, int]]:
    lens = [0, 1, page_size - 1, page_size, page_size + 1, 7, 197]
    return [(1, kv_len) for kv_len in lens]


HEADS = [
    Heads(4, 4, 64, 16),
    Heads(8, 2, 80, 32),
    Heads(7, 1, 96, 64),
    Heads(8, 1, 128, 128),
    Heads(4, 2, 256, 16),
    Heads(14, 2, 64, 64, jnp.bfloat16),
    Heads(16, 2, 128, 64, jnp.bfloat16),
    Heads(4, 4, 80, 128, jnp.float16),
    Heads(8, 4, 256, 64, jnp.bfloat16),
]


@ON_BOTH
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_of_hostile_lengths_is_exact(rng, heads, interpret):
    check_decode(make_case(rng, hostile(heads.page_size), heads), interpret=interpret)


@ON_BOTH
@pytest.mark.parametrize("heads", [Heads(7, 1, 96, 64), Heads(16, 2, 128, 16, jnp.bfloat16)])
def test_decode_of_hostile_lengths_in_parts_is_exact(rng, heads, interpret):
    config = dataclasses.replace(
        paged_decode_triton.default_config(heads.H, heads.dtype),
        min_part=64,
        max_whole=64,
        programs=16,
    )
    case = make_case(rng, hostile(heads.page_size), heads)
    check_decode(case, config=config, interpret=interpret)


@ON_BOTH
@pytest.mark.parametrize(
    ("page_size", "window", "soft_cap"),
    [(16, 1, None), (128, 16, None), (16, 100, 2.0), (128, 1000, None), (64, None, 5.0)],
)
def test_decode_with_a_window_or_soft_cap_is_exact(rng, page_size, window, soft_cap, interpret):
    heads = Heads(4, 2, 64, page_size, jnp.bfloat16)
    case = make_case(rng, hostile(page_size), heads, window=window)
    check_decode(case, window=window, soft_cap=soft_cap, config=CUT, interpret=interpret)


@ON_BOTH
def test_a_long_row_among_short_ones_is_cut_and_exact(rng, interpret):
    lens = [(1, 3), (1, 0), (1, 2900), (1, 130), (1, 64)]
    heads = Heads(8, 2, 64, 64, jnp.bfloat16)
    config = paged_decode_triton.Config(min_part=64, max_whole=128, programs=80)
    check_decode(make_case(rng, lens, heads), config=config, interpret=interpret)


@pytest.mark.parametrize("window", [None, 100])
def test_parts_cover_every_row_once_and_are_balanced(rng, window):
    config = paged_decode_triton.Config()
    for B, longest in [(1, 4096), (1, 130), (37, 2000), (100, 100_000)]:
        kv_lens = rng.integers(0, longest + 1, B) * (rng.random(B) > 0.1)
        cut = functools.partial(
            cut_into_parts,
            max_len=longest,
            page_size=64,
            num_kv_heads=8,
            window=window,
            config=config,
        )
        parts = jax.tree.map(np.asarray, jax.jit(cut)(jnp.asarray(kv_lens, jnp.int32)))
        items = [item for item in parts.items if item[2] >= 0]
        assert len(items) == np.sum(parts.counts)
        for row, kv_len in enumerate(kv_lens):
            mine = [item for item in items if item[0] == row]
            assert mine[0][1] <= max(kv_len - (window or kv_len), 0) and mine[-1][2] == kv_len
            assert all(a[2] == b[1] < b[2] for a, b in zip(mine, mine[1:], strict=False))
            assert {item[3] for item in mine} == {len(mine)}
            first = parts.firsts[row]
            np.testing.assert_array_equal(parts.items[first : first + len(mine)], mine)
        most = max(512, kv_lens.sum() / (528 // 8) + 128)
        assert max(item[2] - item[1] for item in items) <= most


LENS = [(5, 5), (1, 30), (0, 0), (2, 40), (64, 64), (17, 100), (1, 1), (33, 150)]


@ON_BOTH
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_extend_of_hostile_lengths_is_exact(rng, heads, interpret):
    config = SMALL if interpret else None
    case = make_case(rng, LENS, heads, padding=7)
    check_extend(case, config=config, interpret=interpret)


@ON_BOTH
@pytest.mark.parametrize(
    ("page_size", "window", "soft_cap"),
    [(16, 1, None), (128, 16, None), (16, 100, 2.0), (128, 1000, None), (64, None, 5.0)],
)
def test_extend_with_a_window_or_soft_cap_is_exact(rng, page_size, window, soft_cap, interpret):
    heads = Heads(4, 2, 64, page_size, jnp.bfloat16)
    case = make_case(rng, LENS, heads, window=window, padding=3)
    config = SMALL if interpret else None
    check_extend(case, window=window, soft_cap=soft_cap, config=config, interpret=interpret)


@ON_BOTH
def test_default_blocks_are_exact(rng, interpret):
    lens = [(150, 150), (1, 700), (200, 1201), (2, 2)]
    check_extend(make_case(rng, lens, Heads(4, 2, 64, 64, jnp.bfloat16)), interpret=interpret)


def test_only_skipped_rows_and_padding_are_finite(rng):
    case = make_case(rng, [(1, 5), (1, 70), (0, 0)], Heads(4, 2, 64, 16), padding=20)
    assert np.isfinite(extend(case, config=SMALL)).all()


@pytest.mark.parametrize("call", [decode, extend])
def test_what_else_the_cache_holds_does_not_matter(call):
    lens = LENS if call is extend else hostile(64)

    def result(fill: float) -> np.ndarray:
        case = make_case(np.random.default_rng(1), lens, Heads(4, 2, 64), window=30, fill=fill)
        return call(case, window=30)

    for fill in (np.nan, np.inf):
        np.testing.assert_array_equal(result(fill), result(0.0))


def test_unsupported_arrays_are_refused_with_a_reason():
    good: dict[str, Any] = dict(head_size=128, group_size=4, page_size=64, dtype="bfloat16")
    for unsupported in (paged_decode_triton.unsupported, ragged_extend_triton.unsupported):
        assert unsupported(**good) is None
        for name, bad in (("head_size", 72), ("page_size", 8), ("dtype", "float8_e4m3fn")):
            assert f"not {bad}" in str(unsupported(**{**good, name: bad}))
    assert "not 17" in str(paged_decode_triton.unsupported(**{**good, "group_size": 17}))


def shaped(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", paged_decode_triton.SHAPES)
def test_decode_lowers_for_cuda(name):
    dtype = jnp.bfloat16
    B, N, K, H, kv_len, page_size = paged_decode_triton.SHAPES[name]
    text = lower_for_cuda(
        lambda q, cache, kv_lens, table: paged_decode(
            q, cache, kv_lens=kv_lens, page_table=table, scale=H**-0.5, window=None
        ),
        shaped((B, N, H), dtype),
        shaped((1000, 2, K, page_size, H), dtype),
        shaped((B,)),
        shaped((B, -(-kv_len // page_size))),
    ).as_text()
    assert "__gpu$xla.gpu.triton" in text
    assert ("merge" in text) == (kv_len > 512)


@pytest.mark.parametrize("name", ragged_extend_triton.SHAPES)
def test_extend_lowers_for_cuda(name):
    dtype = jnp.bfloat16
    B, N, K, H, query_len, kv_len, page_size = ragged_extend_triton.SHAPES[name]
    text = lower_for_cuda(
        lambda q, cache, starts, lens, kv_lens, table: ragged_extend(
            q,
            cache,
            query_starts=starts,
            query_lens=lens,
            kv_lens=kv_lens,
            page_table=table,
            scale=H**-0.5,
            window=None,
        ),
        shaped((B * query_len, N, H), dtype),
        shaped((1000, 2, K, page_size, H), dtype),
        *[shaped((B,))] * 3,
        shaped((B, -(-kv_len // page_size))),
    ).as_text()
    assert "__gpu$xla.gpu.triton" in text
