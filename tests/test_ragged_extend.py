"""Attention of prompts on tensor cores against float64: interpreted and lowered for CUDA here, run
where there is a GPU. What no row owns, the rest of each last page included, is NaN."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, Heads, Program, Room, abstract, compare, make_case, mixed
from cuda import compile_ahead, lower_for_cuda
from numerics import to_float64

from jaxengine.pallas_kernels import ragged_extend_tiles as tiles
from jaxengine.pallas_kernels.ragged_extend import (
    SHAPES,
    Config,
    config_for,
    ragged_extend,
    unsupported,
)
from jaxengine.pallas_kernels.ragged_extend_producer import for_each_tile

BF16, F16 = jnp.bfloat16, jnp.float16


def calling(heads: Heads, **how: Any) -> Callable[..., Any]:
    """A function of the parts of a case."""
    how = dict(scale=heads.H**-0.5, window=None) | how
    return lambda q, cache, ragged: ragged_extend(q, cache, **ragged, **how)


def check(call: Callable[..., Any], case: Case, program: Program) -> None:
    """Compares the rows that are long enough with float64, and all else with zero."""
    out = np.asarray(call(*case[:3]))
    rest = compare(out, case, min_queries=program.min_queries, **program.masks)
    assert not to_float64(rest).any()


PAGE = 16
HOSTILE = [(2, 2), (1, 9), (0, 0), (PAGE - 1, PAGE - 1), (PAGE, PAGE), (PAGE + 1, 33), (1, 1)]
HOSTILE += [(67, 131), (5, 200)]
CASES = {
    "gqa of 4": (
        HOSTILE,
        Program(Heads(4, 1, 64, PAGE), min_queries=2),
        Config(keys=64, blocks=2),
    ),
    "odd group, window, float16": (
        [(70, 150), (1, 40), (3, 130), (13, 13)],
        Program(Heads(7, 1, 128, 64, F16), window=29),
        Config(blocks=1),
    ),
    "wide heads, soft cap, one head a kv head, pages larger than a step": (
        [(3, 3), (31, 129)],
        Program(Heads(2, 2, 256, 128), soft_cap=2.0),
        Config(keys=64, stages=1, own_output=False, blocks=1),
    ),
}


def padding(lens: list[tuple[int, int]]) -> int:
    """Up to a multiple of 64, and as much again."""
    return 64 + -sum(query_len for query_len, _ in lens) % 64


@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_exact(rng, name):
    lens, program, config = CASES[name]
    case = make_case(rng, lens, program.heads, padding=padding(lens))
    # Not compiled: this interpreter may be called eagerly only.
    how = dict(min_query_len=program.min_queries, config=config, interpret=True)
    check(calling(program.heads, **program.masks, **how), case, program)


def heads_of(name: str, dtype: Any = BF16, **changed: int) -> Heads:
    return Heads(**SHAPES[name] | changed, dtype=dtype)


# Every named shape and page size, and every other choice with most of them.
PROGRAMS = {
    "llama-8b": Program(heads_of("llama-8b")),
    "llama-8b, window": Program(heads_of("llama-8b", F16), window=100, min_queries=2),
    "qwen3-0.6b, cap": Program(heads_of("qwen3-0.6b", page_size=32), soft_cap=5.0),
    "qwen2.5-0.5b": Program(heads_of("qwen2.5-0.5b")),
    "qwen2.5-0.5b, window and cap": Program(
        heads_of("qwen2.5-0.5b", F16, page_size=128), window=77, soft_cap=5.0
    ),
    "gemma": Program(heads_of("gemma", F16)),
    "gemma, window and cap": Program(heads_of("gemma"), window=1000, soft_cap=3.0),
    "olmo, window": Program(heads_of("olmo", F16), window=64),
    "small pages, cap": Program(heads_of("small pages"), soft_cap=5.0, min_queries=2),
    "large pages, window": Program(heads_of("large pages"), window=130),
}
BATCHES = {
    "every length": [(n, n) for n in [1, 2, 3, 5, 7, 8, 63, 64, 65, 97, 127, 128, 129, 255, 257]],
    "chunks": [(64, 1000), (1, 700), (100, 1601), (3, 64), (2, 65), (17, 129), (128, 128)],
    "many decoding": [(1, 1 + 5 * i) for i in range(35)] + [(700, 700), (90, 2048), (1, 3)],
    "one long": [(1200, 1801)],
}
ROOM = Room(1216, max(sum(kv for _, kv in lens) for lens in BATCHES.values()), 2048)


def prepared(program: Program) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and shapes that hold every batch."""
    shapes = abstract(program.rows, program.heads, ROOM)
    return calling(program.heads, **program.masks, min_query_len=program.min_queries), shapes


@pytest.fixture(scope="module")
def compiled():
    return compile_ahead({name: prepared(program) for name, program in PROGRAMS.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_gpu_it_is_exact(rng, compiled, name):
    program = PROGRAMS[name]
    for lens in BATCHES.values():
        case = make_case(rng, mixed(rng, lens, program.rows), program.heads, room=ROOM)
        check(compiled[name].result(), case, program)


@pytest.mark.gpu
def test_on_a_gpu_a_token_does_not_depend_on_how_its_prompt_is_cut(rng):
    heads = heads_of("llama-8b")
    q, cache, ragged, _ = make_case(rng, [(640, 640)], heads)
    call, queries = jax.jit(calling(heads)), np.asarray(q)
    out = np.asarray(call(q, cache, ragged))
    for start, end in [(0, 77), (77, 79), (79, 512), (512, 640)]:
        of_part = dict(
            query_lens=np.array([end - start], np.int32), kv_lens=np.array([end], np.int32)
        )
        part = np.full_like(queries, np.nan)
        part[: end - start] = queries[start:end]
        got = np.asarray(call(part, cache, ragged | of_part))
        np.testing.assert_array_equal(got[: end - start], out[start:end])


@pytest.mark.parametrize("kind", [{}, dict(window=4096, soft_cap=3.0)], ids=["plain", "gemma"])
@pytest.mark.parametrize("name", SHAPES)
def test_production_shapes_lower_for_cuda(name, kind):
    shapes = abstract(64, heads_of(name), Room(4096, 16384, 4096))
    lowered = lower_for_cuda(calling(heads_of(name), **kind), *shapes)
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_gpu_is_tested_with_lowers(name):
    call, shapes = prepared(PROGRAMS[name])
    lower_for_cuda(call, *shapes)


@pytest.mark.parametrize("T", [64, 16384])
@pytest.mark.parametrize("B", [8, 256])
def test_it_lowers_for_every_bucket(T, B):
    heads = heads_of("llama-8b", F16)
    lower_for_cuda(calling(heads), *abstract(B, heads, Room(T, 16384, 4096)))


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


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [8, 16])
def test_no_block_has_much_more_to_do_than_another(num_rows, groups):
    config, T = Config(), 8192
    lens = jnp.full(num_rows, T // num_rows, jnp.int32)
    table, count = tiles.cut_into_tiles(
        jnp.cumsum(lens) - lens,
        lens,
        lens,
        num_tokens=T,
        size=64,
        keys=config.keys,
        window=None,
        min_query_len=1,
        section=config.section_bytes // (2 * 8 * 128 * 2),
    )
    shape: Any = SimpleNamespace(N=2 * groups, heads=2, blocks=config.blocks)
    refs: Any = SimpleNamespace(num_tiles=count)

    def work_of(tile: jax.Array, *_: Any) -> jax.Array:
        return table[tile, tiles.Column.END_STEP] + 1  # for its begin and end

    work_of_block = lambda block: for_each_tile(shape, refs, block, work_of)
    work = np.asarray(jax.vmap(work_of_block)(jnp.arange(config.blocks)))
    assert (
        work.sum() == (np.asarray(table)[: int(count[0]), tiles.Column.END_STEP] + 1).sum() * groups
    )
    assert work.max() < 1.05 * work.mean()


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
    heads = Heads(2, 1, 64, 16)
    q, cache, ragged, _ = make_case(rng, [(3, 3)], heads, padding=61)
    call = calling(heads, interpret=True)
    with pytest.raises(ValueError, match="multiple of 64"):
        call(q[:63], cache, ragged)
    with pytest.raises(ValueError, match="float32"):
        call(q, cache.astype(jnp.float32), ragged)
