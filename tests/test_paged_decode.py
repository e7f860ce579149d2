"""Decode attention on tensor cores against float64: interpreted and lowered for CUDA here, run
where there is a GPU. What no row owns, the rest of each last page included, is NaN."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from numerics import assert_near_exact, softmax_exact, to_float64

from jaxengine.pallas_kernels import paged_decode as module
from jaxengine.pallas_kernels.paged_decode import (
    SHAPES,
    Config,
    config_for,
    paged_decode,
    plan_for,
    unsupported,
)
from jaxengine.pallas_kernels.paged_decode_plan import FIELDS, make_plan

SLOW = jax.__version_info__ < (0, 11)
"""The interpreter of JAX 0.10 takes several seconds a case."""


class Case(NamedTuple):
    """Arguments of one call, and each row's own k and v."""

    q: jax.Array
    cache: jax.Array
    where: dict[str, jax.Array]
    sequences: list[tuple[np.ndarray, np.ndarray]]


def make_case(
    rng: np.random.Generator,
    lens: list[int],
    *,
    N: int,
    K: int,
    H: int,
    page_size: int = 64,
    dtype: Any = jnp.bfloat16,
    fill: float = np.nan,
) -> Case:
    """Rows of `lens` tokens over shuffled pages; whatever no row owns holds `fill`."""
    counts = [-(-kv_len // page_size) for kv_len in lens]
    num_pages = 2 + sum(counts)
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(lens), max(counts) + 1), np.int32)
    cache = np.full((num_pages, 2, K, page_size, H), fill, np.float32)
    sequences = []
    for row, kv_len in enumerate(lens):
        k, v = (
            np.asarray(jnp.asarray(rng.standard_normal((kv_len, K, H)), dtype)) for _ in range(2)
        )
        sequences.append((k, v))
        table[row, : counts[row]] = [free.pop() for _ in range(counts[row])]
        places = np.arange(kv_len)
        pages, places = table[row, places // page_size], places % page_size
        cache[pages, 0, :, places], cache[pages, 1, :, places] = k, v
    q = jnp.asarray(rng.standard_normal((len(lens), N, H)), dtype)
    where = dict(kv_lens=jnp.asarray(lens, jnp.int32), page_table=jnp.asarray(table))
    return Case(q, jnp.asarray(cache, dtype), where, sequences)


def attend(case: Case, *, interpret: bool, window: int | None = None, **how: Any) -> np.ndarray:
    scale = case.q.shape[2] ** -0.5

    def call(q, cache, where):
        how_all = dict(scale=scale, window=window, interpret=interpret, **how)
        return paged_decode(q, cache, **where, **how_all)

    return np.asarray(jax.jit(call)(case.q, case.cache, case.where))


def seen(q, k, v, window: int | None) -> tuple[np.ndarray, ...]:
    """k and v of those that one token sees, each for as many query heads as share it."""
    G = q.shape[0] // k.shape[1]
    start = 0 if window is None else max(len(k) - window, 0)
    return q, np.repeat(k[start:], G, axis=1), np.repeat(v[start:], G, axis=1)


def exact(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    q, k, v = (to_float64(a) for a in seen(q, k, v, window))
    scores = np.einsum("nh,snh->ns", q, k) * q.shape[1] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    return np.einsum("ns,snh->nh", softmax_exact(scores), v)


def naive(q, k, v, *, window: int | None, soft_cap: float | None) -> np.ndarray:
    """The textbook formula in the dtype of its inputs, with float32 softmax."""
    q, k, v = (jnp.asarray(a) for a in seen(q, k, v, window))
    scores = jnp.einsum("nh,snh->ns", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[1] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("ns,snh->nh", weights, v, preferred_element_type=jnp.float32)
    return np.asarray(out.astype(q.dtype))


def check(
    case: Case, *, window: int | None = None, soft_cap: float | None = None, **how: Any
) -> np.ndarray:
    """Compares rows with tokens with float64, and the others with zero."""
    out = attend(case, window=window, soft_cap=soft_cap, **how)
    kinds: dict[str, Any] = dict(window=window, soft_cap=soft_cap)
    q = np.asarray(case.q)
    rows = [row for row, (k, _) in enumerate(case.sequences) if len(k)]
    right = [exact(q[row], *case.sequences[row], **kinds) for row in rows]
    usual = [naive(q[row], *case.sequences[row], **kinds) for row in rows]
    assert_near_exact(out[rows], np.stack(right), np.stack(usual))
    assert not to_float64(np.delete(out, rows, axis=0)).any()
    return out


SMALL = dict(stages=2, min_run=1, merge_cost=1)
CASES = {
    "even runs, rows without tokens, an odd group": dict(
        lens=[130, 0, 1, 64, 65],
        shape=dict(N=14, K=2, H=64),
        how=dict(config=Config(blocks=4, **SMALL)),
    ),
    "aligned runs, one row": dict(
        lens=[300],
        shape=dict(N=4, K=1, H=64),
        how=dict(config=Config(blocks=3, **SMALL)),
    ),
    "window, small pages, float16": dict(
        lens=[129, 63, 200],
        shape=dict(N=4, K=1, H=128, page_size=16, dtype=jnp.float16),
        how=dict(config=Config(blocks=3, **SMALL), window=70),
    ),
    "soft cap, several pages a tile, one head a kv head": dict(
        lens=[67, 257, 127],
        shape=dict(N=2, K=2, H=64, page_size=32),
        how=dict(config=Config(tile=128, blocks=5, **SMALL), soft_cap=2.0),
    ),
    "wide heads, a large group, pages larger than a tile": dict(
        lens=[128, 191],
        shape=dict(N=16, K=1, H=256, page_size=128),
        how=dict(config=Config(blocks=2, **SMALL)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_exact(rng, name):
    if SLOW and name not in list(CASES)[:2]:
        pytest.skip("the interpreter of JAX 0.10 takes too long")
    case = CASES[name]
    check(make_case(rng, case["lens"], **case["shape"]), **case["how"], interpret=True)


@pytest.mark.skipif(SLOW, reason="the interpreter of JAX 0.10 knows no races")
def test_the_warpgroups_of_a_block_do_not_race(rng, monkeypatch, capsys):
    if (params := getattr(module.plgpu, "InterpretGPUParams", None)) is None:
        pytest.skip("this JAX has no public interpreter")
    monkeypatch.setattr(module, "_interpreter", lambda: params(detect_races=True))
    case = make_case(rng, [130, 0, 64], N=7, K=1, H=64)
    # One block, since what makes blocks wait for each other is not there.
    check(case, config=Config(blocks=1, **SMALL), interpret=True)
    assert "RACE" not in capsys.readouterr().out


HEADS = {name.rsplit(" ", 3)[0]: dict(N=s.N, K=s.K, H=s.H) for name, s in SHAPES.items()}
HEADS["wide"] = dict(N=8, K=4, H=256)
HEADS["large group"] = dict(N=32, K=2, H=128)
HEADS["multi-head"] = dict(N=3, K=3, H=64)
ON_GPU = {
    "every length": [1, 2, 3, 5, 7, 8, 63, 64, 65, 97, 127, 128, 129, 191, 255, 256, 257, 1009],
    "one": [1],
    "one long": [5003],
    "many and uneven": [(37 * i * i) % 2003 for i in range(150)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, dict(window=100), dict(soft_cap=30.0)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("lens", ON_GPU)
@pytest.mark.parametrize("name", HEADS)
def test_on_a_gpu_it_is_exact(rng, name, lens, page_size, kind):
    dtype = jnp.float16 if kind else jnp.bfloat16
    case = make_case(rng, ON_GPU[lens], **HEADS[name], page_size=page_size, dtype=dtype)
    check(case, **kind, interpret=False)


@pytest.mark.gpu
def test_on_a_gpu_counters_are_left_as_they_were_found(rng):
    """Many layers use one plan, and all get what the first one gets."""
    case = make_case(rng, [(37 * i * i) % 2003 for i in range(50)], **HEADS["llama-3.1-8b"])
    N, K, H = (HEADS["llama-3.1-8b"][name] for name in "NKH")
    where, how = case.where, dict(scale=H**-0.5, window=None)

    def layers(q, cache):
        plan = plan_for(where["kv_lens"], num_heads=N, num_kv_heads=K, head_size=H, window=None)
        outs = [paged_decode(q, cache, **where, **how, plan=plan)]
        for _ in range(20):
            again = q + (outs[-1] * 0).astype(q.dtype)  # one after another
            outs.append(paged_decode(again, cache, **where, **how, plan=plan))
        return jnp.stack(outs), plan.runs

    outs, runs = jax.jit(layers)(case.q, case.cache)
    assert not np.asarray(runs)[:, FIELDS.index("arrived")].any()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def lower_shape(B: int, N: int, K: int, H: int, page_size: int, kv_len: int, **kind: Any) -> Any:
    dtype, pages = kind.pop("dtype", jnp.bfloat16), -(-kv_len // page_size)
    q = jax.ShapeDtypeStruct((B, N, H), dtype)
    cache = jax.ShapeDtypeStruct((B * pages + 1, 2, K, page_size, H), dtype)
    kv_lens = jax.ShapeDtypeStruct((B,), jnp.int32)
    table = jax.ShapeDtypeStruct((B, pages), jnp.int32)

    def call(q, cache, kv_lens, page_table):
        how: dict[str, Any] = dict(scale=0.1, window=None) | kind
        return paged_decode(q, cache, kv_lens=kv_lens, page_table=page_table, **how)

    return lower_for_cuda(call, q, cache, kv_lens, table)


@pytest.mark.parametrize("name", SHAPES)
def test_it_lowers_for_cuda(name):
    lowered = lower_shape(**SHAPES[name]._asdict())
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 128])
def test_it_lowers_for_other_pages_and_kinds(heads, page_size):
    kind: dict[str, Any] = dict(window=1024, soft_cap=50.0, dtype=jnp.float16)
    lower_shape(B=3, **HEADS[heads], page_size=page_size, kv_len=4096, **kind)


def test_reasons():
    good: dict[str, Any] = dict(head_size=128, group_size=4, page_size=64, dtype="bfloat16")
    assert unsupported(**good) is None
    bad: dict[str, Any] = dict(head_size=96, group_size=17, page_size=8, dtype="float32")
    for name, value in bad.items():
        assert str(value) in str(unsupported(**good | {name: value}))


def walk(runs: np.ndarray, next_rows: np.ndarray, tiles: list[int], K: int) -> dict[Any, int]:
    """Which block does each (row, head, tile), every rule of a plan checked on the way."""
    done, waiting = {}, {}
    for block, run in enumerate(runs):
        row, offset, count, _, size = (int(value) for value in run[:5])
        while count:
            head, begin = divmod(offset, tiles[row])
            end = min(tiles[row], begin + count)
            for tile in range(begin, end):
                assert (row, head, tile) not in done
                done[row, head, tile] = block
            if begin > 0:
                waiting.setdefault(block - (-begin // size), []).append((block, row, head))
            elif end < tiles[row]:
                assert count == end - begin, "a block waits before its work is done"
                partners = -(-(tiles[row] - end) // size)
                before = [(block - 1 - i, row, head) for i in reversed(range(partners))]
                assert waiting.pop(block) == before
            count, offset = count - (end - begin), offset + end - begin
            if offset == tiles[row] * K:
                row, offset = int(next_rows[row]), 0
    assert not waiting
    return done


def plan_and_walk(
    lens: list[int], K: int, blocks: int, window: int | None = None, min_run: int = 2
) -> dict[Any, int]:
    how = dict(num_kv_heads=K, num_blocks=blocks, tile=64, window=window, min_run=min_run)
    names = (*how, "merge_cost")
    plan = jax.jit(make_plan, static_argnames=names)(
        jnp.asarray(lens, jnp.int32), **how, merge_cost=5
    )
    runs, next_rows = np.asarray(plan.runs), np.asarray(plan.next_rows)
    assert not runs[:, FIELDS.index("arrived")].any()
    first = [0 if window is None else max(kv_len - window, 0) // 64 for kv_len in lens]
    tiles = [-(-kv_len // 64) - start for kv_len, start in zip(lens, first, strict=True)]
    for run in runs[runs[:, FIELDS.index("count")] > 0]:
        assert run[FIELDS.index("kv_len")] == lens[run[FIELDS.index("row")]]
    done = walk(runs, next_rows, tiles, K)
    assert len(done) == K * sum(tiles)
    return done


@pytest.mark.parametrize("window", [None, 100])
def test_plans_do_everything_once_and_wait_for_earlier_blocks_only(rng, window):
    plan_and_walk([0], 8, 264, window)
    plan_and_walk([0, 5, 0, 0, 700, 64, 65, 0], 8, 264, window)
    for K, blocks, min_run in [(1, 5, 1), (3, 17, 2), (8, 264, 4)]:  # each compiled once
        for spread in (100, 700, 2500, 20000):
            lens = [int(n) for n in rng.integers(-spread // 8, spread, 41).clip(0)]
            plan_and_walk(lens, K, blocks, window, min_run)


@pytest.mark.parametrize(
    "lens, used, longest",
    [
        ([128], 8, 2),  # nothing is cut that is done in a moment
        ([400], 8, 7),
        ([4096], 176, 3),
        ([4096] * 32, 256, 64),  # each (row, head) in one piece: no waiting
        ([1024] * 128, 261, 63),
        ([100 + 37 * i % 1900 for i in range(64)], 255, None),  # the longest run is that of all
    ],
    ids=["short", "small", "long", "few", "many", "uneven"],
)
def test_plans_use_the_chip(lens, used, longest):
    done = plan_and_walk(lens, 8, 264)
    load = np.bincount(list(done.values()))
    assert (load > 0).sum() >= used
    assert load.max() == longest or longest is None and load.max() * 264 <= 1.05 * len(done)


def test_blocks_fit_on_the_chip():
    for H in module.HEAD_SIZES:
        for G in (1, 8, 16):
            config = config_for(head_size=H, group_size=G)
            ring = config.stages * config.tile * H * 4
            assert ring * -(-config.blocks // module.CORES) < 200 * 1024
