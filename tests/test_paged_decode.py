"""Decode attention on tensor cores against float64: interpreted and lowered for CUDA here, run
where there is a GPU. What no row owns, the rest of each last page included, is NaN."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, Heads, Program, Room, abstract, compare, make_case, mixed
from cuda import compile_ahead, lower_for_cuda
from numerics import to_float64

from jaxengine.pallas_kernels import paged_decode_kernel as module
from jaxengine.pallas_kernels.paged_decode import HEAD_SIZES, SHAPES, paged_decode, unsupported
from jaxengine.pallas_kernels.paged_decode_kernel import CORES, Config, config_for, plan_for
from jaxengine.pallas_kernels.paged_decode_plan import FIELDS, make_plan

SLOW = jax.__version_info__ < (0, 11)
"""The interpreter of JAX 0.10 takes several seconds a case."""


def calling(heads: Heads, **how: Any) -> Callable[..., Any]:
    """A function of the parts of a case."""

    def call(q, cache, ragged):
        where = {name: ragged[name] for name in ("kv_lens", "page_table")}
        return paged_decode(q, cache, **where, scale=heads.H**-0.5, **how)

    return call


def check(call: Callable[..., Any], case: Case, **masks: Any) -> None:
    """Compares rows with tokens with float64, and the others with zero."""
    rest = compare(np.asarray(call(*case[:3])), case, **masks)
    assert not to_float64(rest).any()


SMALL = dict(stages=2, min_run=1, merge_cost=1)
CASES = {
    "even runs, rows without tokens, an odd group": (
        [130, 0, 1, 64, 65, 0],
        Program(Heads(14, 2, 64)),
        Config(blocks=4, **SMALL),
    ),
    "aligned runs, one row": (
        [300],
        Program(Heads(4, 1, 64)),
        Config(blocks=3, **SMALL),
    ),
    "window, small pages, float16": (
        [129, 63, 200],
        Program(Heads(4, 1, 128, 16, jnp.float16), window=70),
        Config(blocks=3, **SMALL),
    ),
    "soft cap, several pages a tile, one head a kv head": (
        [67, 257, 127],
        Program(Heads(2, 2, 64, 32), soft_cap=2.0),
        Config(tile=128, blocks=5, **SMALL),
    ),
    "wide heads, a large group, pages larger than a tile": (
        [128, 191],
        Program(Heads(16, 1, 256, 128)),
        Config(blocks=2, **SMALL),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_exact(rng, name):
    if SLOW and name not in list(CASES)[:2]:
        pytest.skip("the interpreter of JAX 0.10 takes too long")
    lens, program, config = CASES[name]
    call = jax.jit(calling(program.heads, **program.masks, config=config, interpret=True))
    check(call, make_case(rng, [(1, n) for n in lens], program.heads), **program.masks)


@pytest.mark.skipif(SLOW, reason="the interpreter of JAX 0.10 knows no races")
def test_the_warpgroups_of_a_block_do_not_race(rng, monkeypatch, capsys):
    if (params := getattr(module.plgpu, "InterpretGPUParams", None)) is None:
        pytest.skip("this JAX has no public interpreter")
    monkeypatch.setattr(module, "interpreter", lambda: params(detect_races=True))
    heads = Heads(7, 1, 64)
    # One block, since what makes blocks wait for each other is not there.
    call = calling(heads, window=None, config=Config(blocks=1, **SMALL), interpret=True)
    check(jax.jit(call), make_case(rng, [(1, 130), (1, 0), (1, 64)], heads))
    assert "RACE" not in capsys.readouterr().out


# Every head size with every page size, and every other choice with most.
LLAMA, QWEN, WIDE, LARGE_GROUP = (32, 8, 128), (14, 2, 64), (8, 4, 256), (32, 2, 128)
F16 = jnp.float16
PROGRAMS = {
    "llama-3.1-8b": Program(Heads(*LLAMA)),
    "llama-3.1-8b, window": Program(Heads(*LLAMA, 16, F16), window=100),
    "qwen3-0.6b": Program(Heads(16, 8, 128, 128), soft_cap=5.0),
    "qwen3-0.6b, one row": Program(Heads(16, 8, 128), rows=1),
    "qwen2.5-0.5b": Program(Heads(*QWEN), rows=150),
    "qwen2.5-0.5b, window and cap": Program(Heads(*QWEN, 16, F16), window=77, soft_cap=5.0),
    "qwen3-30b-a3b": Program(Heads(32, 4, 128, 32)),
    "wide": Program(Heads(*WIDE)),
    "wide, window": Program(Heads(*WIDE, 16, F16), window=1000),
    "wide, cap": Program(Heads(*WIDE, 128), soft_cap=3.0),
    "wide, one row": Program(Heads(*WIDE, 32, F16), soft_cap=5.0, rows=1),
    "large group": Program(Heads(*LARGE_GROUP, 128), window=100, rows=100),
    "large group, small pages": Program(Heads(*LARGE_GROUP, 32, F16)),
    "multi-head": Program(Heads(3, 3, 64, 128, F16), window=200, rows=100),
    "multi-head, cap": Program(Heads(3, 3, 64, 32), soft_cap=5.0),
}
BATCHES = [
    [1],
    [5003],
    [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129]
    + [191, 255, 256, 257, 1009, 2003],
]


def batches_of(program: Program) -> list[list[int]]:
    """Those with room in its rows; and so many rows that blocks have parts of several."""
    return [lens for lens in BATCHES if len(lens) <= program.rows] + [
        [(37 * row * row) % 401 for row in range(program.rows)]
    ]


def room_for(program: Program) -> Room:
    batches = batches_of(program)
    return Room(program.rows, max(map(sum, batches)), max(map(max, batches)))


def prepared(program: Program) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and shapes that hold every batch."""
    shapes = abstract(program.rows, program.heads, room_for(program))
    return calling(program.heads, **program.masks), shapes


@pytest.fixture(scope="module")
def compiled():
    return compile_ahead({name: prepared(program) for name, program in PROGRAMS.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_gpu_it_is_exact(rng, compiled, name):
    program = PROGRAMS[name]
    for lens in batches_of(program):
        rows = mixed(rng, [(1, n) for n in lens], program.rows, empty=(1, 0))
        case = make_case(rng, rows, program.heads, room=room_for(program))
        check(compiled[name].result(), case, **program.masks)


@pytest.mark.gpu
def test_on_a_gpu_counters_are_left_as_they_were_found(rng):
    """Many layers use one plan, and all get what the first one gets."""
    N, K, H = LLAMA
    lens = [(1, (37 * i * i) % 1009) for i in range(50)]
    q, cache, ragged, _ = make_case(rng, lens, Heads(*LLAMA))

    def layers(q, cache, kv_lens, page_table):
        plan = plan_for(kv_lens, num_heads=N, num_kv_heads=K, head_size=H, window=None)
        how = dict(kv_lens=kv_lens, page_table=page_table, scale=H**-0.5, window=None)
        layer = jax.jit(lambda q, cache: paged_decode(q, cache, **how, plan=plan))  # lowered once
        outs = [layer(q, cache)]
        for _ in range(8):
            outs.append(layer(q + (outs[-1] * 0).astype(q.dtype), cache))  # one after another
        return jnp.stack(outs), plan.runs

    outs, runs = jax.jit(layers)(q, cache, ragged["kv_lens"], ragged["page_table"])
    outs = np.asarray(outs)
    assert not np.asarray(runs)[:, FIELDS.index("arrived")].any()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("name", SHAPES)
def test_production_shapes_lower_for_cuda(name):
    B, N, K, H, kv_len, page_size = SHAPES[name]
    heads, room = Heads(N, K, H, page_size), Room(B, B * kv_len, kv_len)
    lowered = lower_for_cuda(calling(heads, window=None), *abstract(B, heads, room))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_gpu_is_tested_with_lowers(name):
    call, arguments = prepared(PROGRAMS[name])
    lower_for_cuda(call, *arguments)


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
    for H in HEAD_SIZES:
        for G in (1, 8, 16):
            config = config_for(head_size=H, group_size=G)
            ring = config.stages * config.tile * H * 4
            assert ring * -(-config.blocks // CORES) < 200 * 1024
