"""Attention of prompts on tensor cores against float64: interpreted and lowered for CUDA here, run
where there is a GPU. What no row owns, the rest of each last page included, is NaN."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from numerics import assert_near_exact, causal_mask, softmax_exact, to_float64

from jaxengine.pallas_kernels import ragged_extend_tiles as tiles
from jaxengine.pallas_kernels.ragged_extend import (
    SHAPES,
    Config,
    config_for,
    ragged_extend,
    unsupported,
)


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
    N: int,
    K: int,
    H: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    num_tokens: int = 0,
) -> Case:
    """Rows of (query_len, kv_len) tokens over shuffled pages, padded to a multiple of 64."""
    counts = [-(-kv_len // page_size) for _, kv_len in lens]
    num_pages, B = 2 + sum(counts), len(lens)
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((B, max(counts) + 1), np.int32)
    cache = np.full((num_pages, 2, K, page_size, H), np.nan, np.float32)
    sequences = []
    for row, (query_len, kv_len) in enumerate(lens):
        shapes = (query_len, N, H), (kv_len, K, H), (kv_len, K, H)
        q, k, v = (np.asarray(jnp.asarray(rng.standard_normal(s), dtype)) for s in shapes)
        sequences.append((q, k, v))
        table[row, : counts[row]] = [free.pop() for _ in range(counts[row])]
        places = np.arange(kv_len)
        pages = table[row, places // page_size]
        cache[pages, 0, :, places % page_size] = k
        cache[pages, 1, :, places % page_size] = v
    query_lens = np.array([q for q, _ in lens])
    total = int(query_lens.sum())
    padding = max(num_tokens, -(-total // 64) * 64) - total
    q = np.concatenate([*(q for q, _, _ in sequences), np.full((padding, N, H), np.nan)])
    ragged = dict(
        query_starts=np.cumsum(query_lens) - query_lens,
        query_lens=query_lens,
        kv_lens=[kv_len for _, kv_len in lens],
        page_table=table,
    )
    ragged = {name: jnp.asarray(value, jnp.int32) for name, value in ragged.items()}
    return Case(jnp.asarray(q, dtype), jnp.asarray(cache, dtype), ragged, sequences)


def attend(case: Case, **how: Any) -> np.ndarray:
    scale = case.q.shape[2] ** -0.5
    call = lambda q, cache, ragged: ragged_extend(q, cache, **ragged, scale=scale, **how)
    # The list of tiles is compiled, the kernel is not: an interpreter may be called eagerly only.
    if not how["interpret"]:
        call = jax.jit(call)
    return np.asarray(call(case.q, case.cache, case.ragged))


def exact(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    q, k, v = (to_float64(a) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) * q.shape[2] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(causal_mask(len(q), len(k), window), scores, -np.inf)
    return np.einsum("nts,snh->tnh", softmax_exact(scores), v)


def naive(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    """The textbook formula in the dtype of its inputs, with float32 softmax."""
    G = q.shape[1] // k.shape[1]
    q, k, v = jnp.asarray(q), *(jnp.repeat(jnp.asarray(a), G, axis=1) for a in (k, v))
    scores = jnp.einsum("tnh,snh->nts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[2] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(jnp.asarray(causal_mask(len(q), len(k), window))[None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("nts,snh->tnh", weights, v, preferred_element_type=jnp.float32)
    return np.asarray(out.astype(q.dtype))


def check(case: Case, *, window: int | None = None, soft_cap: float | None = None, **how) -> None:
    """Compares the rows of several tokens with float64, and all else with zero."""
    out = attend(case, window=window, soft_cap=soft_cap, **how)
    kinds: dict[str, Any] = dict(window=window, soft_cap=soft_cap)
    got, right, usual, rest = [], [], [], []
    start = 0
    for q, k, v in case.sequences:
        own = out[start : start + len(q)]
        if len(q) > 1:
            got, right = [*got, own], [*right, exact(q, k, v, **kinds)]
            usual = [*usual, naive(q, k, v, **kinds)]
        else:
            rest.append(own)
        start += len(q)
    assert_near_exact(np.concatenate(got), np.concatenate(right), np.concatenate(usual))
    assert not to_float64(np.concatenate([*rest, out[start:]])).any()


PAGE = 16
HOSTILE = [(2, 2), (1, 9), (0, 0), (PAGE - 1, PAGE - 1), (PAGE, PAGE), (PAGE + 1, 33), (1, 1)]
HOSTILE += [(67, 131), (5, 200)]
CASES: dict[str, dict[str, Any]] = {
    "gqa of 4": dict(
        lens=HOSTILE,
        shape=dict(N=4, K=1, H=64, page_size=PAGE),
        how=dict(config=Config(keys=64, blocks=2)),
    ),
    "odd group, window, float16": dict(
        lens=[(70, 150), (1, 40), (3, 130), (13, 13)],
        shape=dict(N=7, K=1, H=128, page_size=64, dtype=jnp.float16),
        how=dict(config=Config(blocks=1), window=29),
    ),
    "wide heads, soft cap, one head a kv head, pages larger than a step": dict(
        lens=[(3, 3), (31, 129)],
        shape=dict(N=2, K=2, H=256, page_size=128, num_tokens=192),
        how=dict(config=Config(keys=64, stages=1, own_output=False, blocks=1), soft_cap=2.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_exact(rng, name):
    case = CASES[name]
    check(make_case(rng, case["lens"], **case["shape"]), **case["how"], interpret=True)


ON_GPU = {
    "every length": [(n, n) for n in [1, 2, 3, 5, 7, 8, 63, 64, 65, 97, 127, 128, 129, 255, 257]],
    "chunks": [(64, 1000), (1, 700), (100, 1601), (3, 64), (2, 65), (17, 129), (128, 128)],
    "many decoding": [(1, 1 + 37 * i) for i in range(100)] + [(700, 700), (90, 2048), (1, 3)],
    "one long": [(1500, 3001)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, dict(window=100), dict(soft_cap=30.0)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("lens", ON_GPU)
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu_it_is_exact(rng, name, lens, dtype, kind):
    case = make_case(rng, ON_GPU[lens], **SHAPES[name], dtype=dtype)
    check(case, **({"window": None} | kind), interpret=False)


@pytest.mark.gpu
def test_on_a_gpu_a_token_does_not_depend_on_how_its_prompt_is_cut(rng):
    whole = make_case(rng, [(640, 640)], **SHAPES["llama-8b"])
    out = attend(whole, window=None, interpret=False)
    for start, end in [(0, 77), (77, 79), (79, 512), (512, 640)]:
        ragged = whole.ragged | dict(
            query_lens=jnp.full(1, end - start, jnp.int32), kv_lens=jnp.full(1, end, jnp.int32)
        )
        q = jnp.pad(whole.q[start:end], ((0, -(end - start) % 64), (0, 0), (0, 0)))
        part = attend(whole._replace(q=q, ragged=ragged), window=None, interpret=False)
        np.testing.assert_array_equal(part[: end - start], out[start:end])


def arguments(shape: dict[str, int], dtype: Any, T: int, B: int) -> tuple[Any, Any, dict[str, Any]]:
    N, K, H, page_size = (shape[name] for name in ("N", "K", "H", "page_size"))
    rows = jax.ShapeDtypeStruct((B,), jnp.int32)
    table = jax.ShapeDtypeStruct((B, 4096 // page_size), jnp.int32)
    ragged = dict(query_starts=rows, query_lens=rows, kv_lens=rows, page_table=table)
    cache = jax.ShapeDtypeStruct((500, 2, K, page_size, H), dtype)
    return jax.ShapeDtypeStruct((T, N, H), dtype), cache, ragged


@pytest.mark.parametrize("kind", [{}, dict(window=4096, soft_cap=50.0)], ids=["plain", "gemma"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_lowers_for_cuda(name, kind):
    def call(q, cache, ragged):
        return ragged_extend(q, cache, **ragged, scale=0.1, **({"window": None} | kind))

    lowered = lower_for_cuda(call, *arguments(SHAPES[name], jnp.bfloat16, 4096, 64))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("T", [64, 16384])
@pytest.mark.parametrize("B", [8, 256])
def test_it_lowers_for_every_bucket(T, B):
    def call(q, cache, ragged):
        return ragged_extend(q, cache, **ragged, scale=0.1, window=None)

    lower_for_cuda(call, *arguments(SHAPES["llama-8b"], jnp.float16, T, B))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("window", "shortest"), [(None, 1), (None, 2), (100, 1)])
def test_tiles_cover_every_token_once_and_every_key_it_sees(rng, size, window, shortest):
    T, keys = 1024, 64
    static: dict[str, Any] = dict(num_tokens=T, size=size, keys=keys, window=window, section=700)
    static["min_query_len"] = shortest
    cut = jax.jit(tiles.cut_into_tiles, static_argnames=tuple(static))
    for _ in range(20):
        query_lens = rng.choice([0, 1, 1, 2, 7, 64, 65, 150], size=16)
        query_lens[np.cumsum(query_lens) > T] = 0
        kv_lens = query_lens + rng.integers(0, 300, size=16) * (query_lens > 0)
        starts = np.cumsum(query_lens) - query_lens
        given = (jnp.asarray(a, jnp.int32) for a in (starts, query_lens, kv_lens))
        table, count = (np.asarray(a) for a in cut(*given, **static))
        owner = np.full(T, -1)
        for row in np.flatnonzero(query_lens >= shortest):
            owner[starts[row] : starts[row] + query_lens[row]] = row
        covered = np.zeros(T, int)
        for tile in table[: count[0]]:
            base, start, end, position, kv_len, row, first, stop = tile
            assert base % 8 == 0 and base <= start < end <= base + size
            covered[start:end] += 1
            is_row = owner[start] >= 0
            assert (owner[start:end] == (row if is_row else -1)).all()
            if not is_row:
                assert position + size <= 0 and kv_len == first == 0 and stop == 1
                continue
            assert kv_len == kv_lens[row]
            assert position == kv_len - query_lens[row] + base - starts[row]
            low, high = position + start - base, position + end - 1 - base
            assert stop == high // keys + 1
            assert first == (0 if window is None else max(low - window + 1, 0) // keys)
        assert (covered == 1).all()


def test_tiles_with_most_keys_come_first():
    lens = jnp.asarray([128, 1, 256], jnp.int32)
    how: dict[str, Any] = dict(num_tokens=448, size=64, keys=64, window=None, min_query_len=2)
    starts = jnp.cumsum(lens) - lens
    for section, expected in (2**20, [4, 4, 3, 2, 2, 1, 1]), (100, [2, 1, 4, 4, 3, 2, 1]):
        table, count = tiles.cut_into_tiles(starts, lens, lens, **how, section=section)
        table = np.asarray(table)[: int(count[0])]
        of_rows = table[table[:, tiles.Column.KV_LEN] > 0]
        assert of_rows[:, tiles.Column.END_STEP].tolist() == expected


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(dtype="float32"), "not float32"),
        (dict(head_size=80), "not 80"),
        (dict(page_size=8), "not 8"),
        (dict(config=Config(keys=96)), "got 96"),
        (dict(config=Config(stages=4)), "shared memory"),
    ],
    ids=str,
)
def test_what_is_unsupported_has_its_reason(changed, reason):
    usual: dict[str, Any] = dict(head_size=128, group_size=4, page_size=64, dtype=jnp.bfloat16)
    assert unsupported(**usual) is None
    assert reason in (unsupported(**(usual | changed)) or "")


def test_every_named_shape_is_supported():
    for shape in SHAPES.values():
        usual: dict[str, Any] = dict(
            head_size=shape["H"], page_size=shape["page_size"], dtype="float16"
        )
        assert unsupported(**usual, group_size=1, config=config_for(shape["H"])) is None


def test_a_call_that_cannot_be_served_says_why(rng):
    case = make_case(rng, [(3, 3)], N=2, K=1, H=64, page_size=16)
    with pytest.raises(ValueError, match="multiple of 64"):
        attend(case._replace(q=case.q[:63]), window=None, interpret=True)
    with pytest.raises(ValueError, match="float32"):
        attend(case._replace(cache=case.cache.astype(jnp.float32)), window=None, interpret=True)
