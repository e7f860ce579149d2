"""Rotation, KV write and decode attention in one kernel against float64, in a cache that holds NaN
where the rows' own tokens belong: interpreted and lowered for CUDA here, run where there is a GPU.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, Heads, compare, make_case
from cuda import compile_ahead, lower_for_cuda
from numerics import assert_near_exact, noise, to_float64
from test_rotate_and_write import EPS, exact

from jaxengine.pallas_kernels import paged_decode_kernel as module
from jaxengine.pallas_kernels.paged_decode import (
    HEAD_SIZES,
    rotate_write_and_decode,
    unsupported_fused,
)
from jaxengine.pallas_kernels.paged_decode_kernel import Config
from jaxengine.pallas_kernels.rotate_and_write import SHAPES, reference

NOWHERE = 10**6  # a page beyond any cache
SLOW = jax.__version_info__ < (0, 11)
"""The interpreter of JAX 0.10 takes several seconds a case."""


class Fused(NamedTuple):
    """Arguments of a call; what attention must see, and what must be in the cache behind it."""

    arguments: dict[str, jax.Array]
    attention: Case
    written: np.ndarray  # by row: whether it has a place in the cache
    kv: np.ndarray  # [B 2 K H], exact
    naive_kv: np.ndarray


def make(
    rng: np.random.Generator,
    lens: list[int],
    heads: Heads,
    *,
    norms: bool = True,
    unwritten: tuple[int, ...] = (),
) -> Fused:
    """Rows of so many tokens, the last of which is to be read; `unwritten` ones keep their K and V
    to themselves."""
    (N, K, H, page_size, dtype), B = heads, len(lens)
    case = make_case(rng, [(1, n) for n in lens], heads)
    qkv = noise(rng, (B, K, N // K + 2, H), dtype, scale=3.0)
    angles = rng.uniform(0, 2 * np.pi, (B, H // 2))
    floats = dict(cos=np.cos(angles), sin=np.sin(angles))
    if norms:
        floats |= dict(q_norm=rng.standard_normal(H), k_norm=rng.standard_normal(H))
    floats = {name: value.astype(dtype) for name, value in floats.items()}
    last = np.maximum(np.array(lens) - 1, 0)
    pages = np.asarray(case.ragged["page_table"])[np.arange(B), last // page_size]
    written = np.array([n > 0 and row not in unwritten for row, n in enumerate(lens)])
    page_ids, offsets = np.where(written, pages, NOWHERE + np.arange(B)), last % page_size
    cache = np.array(case.cache)
    cache[pages, :, :, offsets] = np.nan
    places = dict(page_ids=jnp.asarray(page_ids), offsets=jnp.asarray(offsets))
    arguments = dict(qkv=qkv, cache=cache) | floats
    wide = {name: to_float64(value) for name, value in arguments.items()}
    q, kv = exact(page_ids=page_ids, offsets=offsets, **wide)
    with jax.default_device(jax.devices("cpu")[0]):
        # Everything in a place of its own, for rows without one as well.
        own = dict(page_ids=jnp.arange(B), offsets=jnp.zeros(B, jnp.int32))
        room = jnp.zeros((B, 2, K, 1, H), dtype)
        turn = {name: jnp.asarray(value) for name, value in floats.items()}
        _, naive = reference(jnp.asarray(qkv), room, **turn, **own, eps=EPS)
    sequences = []
    for row, (_, k, v) in enumerate(case.sequences):
        k, v = np.array(k), np.array(v)
        if len(k):
            k[-1], v[-1] = kv[row].astype(dtype)
        sequences.append((q[row].astype(dtype)[None], k, v))
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()} | places
    arrays |= {name: case.ragged[name] for name in ("kv_lens", "page_table")}
    arrays = {n: a if a.dtype == dtype else a.astype(jnp.int32) for n, a in arrays.items()}
    attention = case._replace(sequences=sequences)
    return Fused(arrays, attention, written, kv, np.asarray(naive[:, :, :, 0]))


def call(arguments: dict[str, Any], **how: Any) -> tuple[jax.Array, jax.Array]:
    arguments = dict(window=None) | how | arguments
    qkv, cache = arguments.pop("qkv"), arguments.pop("cache")
    scale = qkv.shape[3] ** -0.5
    return rotate_write_and_decode(qkv, cache, **arguments, eps=EPS, scale=scale)


def check(got: tuple[jax.Array, jax.Array], case: Fused, **masks: Any) -> None:
    """Attention, what was written, and that the rest of the cache is as it was."""
    out, cache = map(np.array, got)
    assert not to_float64(compare(out, case.attention, **masks)).any()
    page_ids, offsets = (np.asarray(case.arguments[name]) for name in ("page_ids", "offsets"))
    places = page_ids[case.written], slice(None), slice(None), offsets[case.written]
    rows = [f"K and V of row {row}" for row in np.flatnonzero(case.written)]
    of = lambda kv: kv[case.written]
    assert_near_exact(cache[places], of(case.kv), of(case.naive_kv), rows=rows)
    cache[places] = np.nan
    np.testing.assert_array_equal(to_float64(cache), to_float64(case.arguments["cache"]))


SMALL = dict(stages=2, min_run=1, merge_cost=1)
CASES: dict[str, tuple[list[int], Heads, dict[str, Any], dict[str, Any]]] = {
    "even runs, rows without tokens, first tokens": (
        [130, 0, 1, 64, 65],
        Heads(4, 2, 128),
        dict(unwritten=(3,)),
        dict(config=Config(blocks=4, **SMALL)),
    ),
    "aligned runs, a large group, small pages, no norms": (
        [200],
        Heads(7, 1, 128, 16),
        dict(norms=False),
        dict(config=Config(blocks=3, **SMALL)),
    ),
    "window, wide heads, float16": (
        [70, 129],
        Heads(2, 1, 256, 64, jnp.float16),
        {},
        dict(config=Config(blocks=2, **SMALL), window=66),
    ),
    "soft cap": (
        [67, 3],
        Heads(2, 2, 128, 32),
        {},
        dict(config=Config(blocks=3, **SMALL), soft_cap=2.0),
    ),
}


def masks_of(how: dict[str, Any]) -> dict[str, Any]:
    return {name: how[name] for name in ("window", "soft_cap") if name in how}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_exact(rng, name):
    if SLOW and name != next(iter(CASES)):
        pytest.skip("the interpreter of JAX 0.10 takes too long")
    lens, heads, what, how = CASES[name]
    case = make(rng, lens, heads, **what)
    check(jax.jit(partial(call, **how, interpret=True))(case.arguments), case, **masks_of(how))


@pytest.mark.skipif(SLOW, reason="the interpreter of JAX 0.10 knows no races")
def test_the_warpgroups_of_a_block_do_not_race(rng, monkeypatch, capsys):
    if (params := getattr(module.plgpu, "InterpretGPUParams", None)) is None:
        pytest.skip("this JAX has no public interpreter")
    monkeypatch.setattr(module, "interpreter", lambda: params(detect_races=True))
    case = make(rng, [130, 0, 64], Heads(2, 1, 128))
    # One block, since what makes blocks wait for each other is not there.
    how = dict(config=Config(blocks=1, **SMALL), interpret=True)
    check(jax.jit(partial(call, **how))(case.arguments), case)
    assert "RACE" not in capsys.readouterr().out


ON_GPU: dict[str, tuple[list[int], Heads, dict[str, Any], dict[str, Any]]] = {
    "qwen3-0.6b, one row": ([1063], Heads(16, 8, 128), {}, {}),
    "first tokens": ([1, 1, 0, 1], Heads(16, 8, 128), {}, {}),
    "llama-3.1-8b": (
        [5003, 2, 0, 64, 65, 128, 129, 700],
        Heads(32, 8, 128),
        dict(norms=False, unwritten=(0, 4)),
        {},
    ),
    "many rows": ([(37 * row * row) % 1009 for row in range(150)], Heads(16, 8, 128), {}, {}),
    "large groups, window": ([300, 99, 100, 101, 1, 5], Heads(14, 2, 128), {}, dict(window=100)),
    "larger groups, small pages": ([700, 31, 33], Heads(16, 1, 128, 16), {}, {}),
    "wide": ([700, 0, 65], Heads(8, 4, 256, 32), {}, {}),
    "wide, large groups, soft cap": ([700, 1, 64], Heads(16, 1, 256), {}, dict(soft_cap=5.0)),
    "multi-head, float16": (
        [257, 4],
        Heads(3, 3, 128, 128, jnp.float16),
        {},
        dict(window=200, soft_cap=3.0),
    ),
}


@pytest.fixture(scope="module")
def compiled():
    cases = {
        name: make(np.random.default_rng(0), lens, heads, **what)
        for name, (lens, heads, what, _) in ON_GPU.items()
    }
    calls = {name: (partial(call, **ON_GPU[name][3]), [cases[name].arguments]) for name in cases}
    return {name: (cases[name], future) for name, future in compile_ahead(calls).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_is_exact(compiled, name):
    case, future = compiled[name]
    check(future.result()(case.arguments), case, **masks_of(ON_GPU[name][3]))


@pytest.mark.parametrize("name", ON_GPU)
def test_what_a_gpu_is_tested_with_lowers_and_writes_in_place(rng, name):
    _, heads, what, how = ON_GPU[name]
    others = make(rng, [3, 1], heads, **dict(what, unwritten=())).arguments
    cache = others.pop("cache")
    in_place = lambda cache, others: call(dict(others, cache=cache), **how)
    text = lower_for_cuda(in_place, cache, others, donate=0).as_text()
    assert text.count("mosaic_gpu_v2") == 1 and "output_operand_alias" in text


def test_heads_whose_halves_are_too_short_are_refused(rng):
    assert [size for size in HEAD_SIZES if unsupported_fused(size) is None] == [128, 256]
    assert {shape["H"] for shape in SHAPES.values()} == {64, 128}
    with pytest.raises(ValueError, match="which 64 has not"):
        call(make(rng, [3], Heads(2, 1, 64)).arguments)
