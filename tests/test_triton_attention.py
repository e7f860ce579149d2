"""The Triton attention kernels, interpreted on a CPU and real on a GPU, against float64; pages and
rows that nobody owns are NaN. And their lowering for CUDA at production shapes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, Heads, Program, Room, abstract, compare, make_case, mixed
from cuda import compile_ahead, lower_for_cuda
from numerics import to_float64

from jaxengine.pallas_kernels import paged_decode_triton, ragged_extend_triton
from jaxengine.pallas_kernels.paged_decode_triton import cut_into_parts, paged_decode
from jaxengine.pallas_kernels.ragged_extend_triton import ragged_extend

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
CUT = paged_decode_triton.Config(min_part=64, max_whole=64, programs=16)
SMALL = ragged_extend_triton.Config(block=16, step=32)
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def decoding(heads: Heads, **how: Any) -> Callable[..., Any]:
    """A function of the parts of a case."""
    how = dict(scale=heads.H**-0.5, window=None) | how

    def call(q, cache, ragged):
        where = {name: ragged[name] for name in ("kv_lens", "page_table")}
        return paged_decode(q, cache, **where, **how)

    return call


def extending(heads: Heads, **how: Any) -> Callable[..., Any]:
    """A function of the parts of a case."""
    how = dict(scale=heads.H**-0.5, window=None) | how
    return lambda q, cache, ragged: ragged_extend(q, cache, **ragged, **how)


def check_decode(call: Callable[..., Any], case: Case, **masks: Any) -> None:
    """Compares rows with tokens with float64, and the others with zero."""
    rest = compare(np.asarray(call(*case[:3])), case, **masks)
    assert not to_float64(rest).any()


def check_extend(call: Callable[..., Any], case: Case, min_queries: int = 1, **masks: Any) -> None:
    """Compares rows that are long enough; all else must be finite."""
    rest = compare(np.asarray(call(*case[:3])), case, min_queries=min_queries, **masks)
    assert np.isfinite(to_float64(rest)).all()


def decode(case: Case, heads: Heads, **how: Any) -> None:
    """Interpreted."""
    masks = {name: how.get(name) for name in ("window", "soft_cap")}
    check_decode(jax.jit(decoding(heads, **how, interpret=True)), case, **masks)


def extend(case: Case, heads: Heads, config: Any = SMALL, **masks: Any) -> None:
    """Interpreted."""
    call = extending(heads, **masks, config=config, interpret=True)
    check_extend(jax.jit(call), case, **masks)


def hostile(page_size: int) -> list[tuple[int, int]]:
    lens = [0, 1, page_size - 1, page_size, page_size + 1, 7, 197]
    return [(1, kv_len) for kv_len in lens]


HEADS = [
    Heads(4, 4, 64, 16, F32),
    Heads(8, 2, 80, 32, F32),
    Heads(7, 1, 96, 64, F32),
    Heads(8, 1, 128, 128, F32),
    Heads(4, 2, 256, 16, F32),
    Heads(14, 2, 64, 64),
    Heads(16, 2, 128, 64),
    Heads(4, 4, 80, 128, F16),
    Heads(8, 4, 256, 64),
]
MASKS = pytest.mark.parametrize(
    ("page_size", "window", "soft_cap"),
    [(16, 1, None), (128, 16, None), (16, 100, 2.0), (128, 1000, None), (64, None, 5.0)],
)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_of_hostile_lengths_is_exact(rng, heads):
    decode(make_case(rng, hostile(heads.page_size), heads), heads)


@pytest.mark.parametrize("heads", [Heads(7, 1, 96, 64, F32), Heads(16, 2, 128, 16)], ids=str)
def test_decode_of_hostile_lengths_in_parts_is_exact(rng, heads):
    usual = paged_decode_triton.default_config(heads.H, heads.dtype)
    config = dataclasses.replace(usual, min_part=64, max_whole=64, programs=16)
    decode(make_case(rng, hostile(heads.page_size), heads), heads, config=config)


@MASKS
def test_decode_with_a_window_or_soft_cap_is_exact(rng, page_size, window, soft_cap):
    heads = Heads(4, 2, 64, page_size)
    case = make_case(rng, hostile(page_size), heads, forgotten=window)
    decode(case, heads, window=window, soft_cap=soft_cap, config=CUT)


def test_a_long_row_among_short_ones_is_cut_and_exact(rng):
    lens, heads = [(1, 3), (1, 0), (1, 2900), (1, 130), (1, 64)], Heads(8, 2, 64)
    config = paged_decode_triton.Config(min_part=64, max_whole=128, programs=80)
    decode(make_case(rng, lens, heads), heads, config=config)


# Every head size, group and page size that models have, and others that no model has with them.
DECODING = {
    "llama-3.1-8b": Program(Heads(32, 8, 128)),
    "qwen3-0.6b": Program(Heads(16, 8, 128, 16, F16), soft_cap=5.0),
    "qwen2.5-0.5b": Program(Heads(14, 2, 64)),
    "qwen2.5-0.5b, one row": Program(Heads(14, 2, 64, 16), rows=1),
    "qwen3-30b-a3b": Program(Heads(32, 4, 128, 32), window=100),
    "gemma": Program(Heads(8, 4, 256), window=1000, soft_cap=3.0),
    "large group": Program(Heads(16, 1, 128, 128, F16), window=100),
    "head size 80": Program(Heads(4, 4, 80, 128, F16)),
    "head size 96": Program(Heads(7, 1, 96, 32, F32), soft_cap=5.0),
    "float32": Program(Heads(8, 1, 128, 16, F32), window=16),
    "float32, wide": Program(Heads(4, 2, 256, 128, F32)),
}
SHORT = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 197, 255, 256, 257]
LONG = [[5003], [*SHORT, 1009, 2003], [(37 * row * row) % 1009 for row in range(40)]]
DECODE_BATCHES = {"whole": [[1], SHORT, [0]], "cut": [[1], *LONG]}
"""A kernel of its own merges what a wide page table lets be cut."""


def decode_batches(name: str, how: str) -> tuple[list[Any], Room]:
    rows = DECODING[name].rows
    batches = [lens for lens in DECODE_BATCHES[how] if len(lens) <= rows]
    return batches, Room(rows, max(map(sum, batches)), max(map(max, batches)))


def prepared(kind: str, name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and shapes that hold every batch."""
    if kind == "extend":
        program = EXTENDING[name]
        call, room = extending(program.heads, **program.masks), EXTEND_ROOM
    else:
        program, room = DECODING[name], decode_batches(name, kind)[1]
        call = decoding(program.heads, **program.masks)
    return call, abstract(program.rows, program.heads, room)


@pytest.fixture(scope="module")
def compiled():
    return compile_ahead({key: prepared(*key) for key in PREPARED})


@pytest.mark.gpu
@pytest.mark.parametrize("how", DECODE_BATCHES)
@pytest.mark.parametrize("name", DECODING)
def test_on_a_gpu_decode_is_exact(rng, compiled, name, how):
    program = DECODING[name]
    heads, window, rows = program.heads, program.window, program.rows
    batches, room = decode_batches(name, how)
    for lens in batches:
        lens = mixed(rng, [(1, n) for n in lens], rows, empty=(1, 0))
        case = make_case(rng, lens, heads, room=room, forgotten=window)
        check_decode(compiled[how, name].result(), case, **program.masks)


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


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_extend_of_hostile_lengths_is_exact(rng, heads):
    extend(make_case(rng, LENS, heads, padding=7), heads)


@MASKS
def test_extend_with_a_window_or_soft_cap_is_exact(rng, page_size, window, soft_cap):
    heads = Heads(4, 2, 64, page_size)
    case = make_case(rng, LENS, heads, forgotten=window, padding=3)
    extend(case, heads, window=window, soft_cap=soft_cap)


def test_default_blocks_are_exact(rng):
    lens, heads = [(150, 150), (1, 700), (200, 1201), (2, 2)], Heads(4, 2, 64)
    extend(make_case(rng, lens, heads), heads, config=None)


def test_only_skipped_rows_and_padding_are_finite(rng):
    heads = Heads(4, 2, 64, 16)
    case = make_case(rng, [(1, 5), (1, 70), (0, 0)], heads, padding=20)
    check_extend(extending(heads, min_query_len=2, config=SMALL, interpret=True), case, 2)


EXTENDING = {
    "llama-3.1-8b": Program(Heads(32, 8, 128)),
    "qwen2.5-0.5b": Program(Heads(14, 2, 64)),
    "qwen2.5-0.5b, window": Program(Heads(14, 2, 64, 16, F16), window=16),
    "gemma": Program(Heads(8, 4, 256), window=1000, soft_cap=3.0),
    "multi-head": Program(Heads(4, 4, 128, 32), window=100, soft_cap=2.0),
    "head size 80": Program(Heads(4, 4, 80, 128, F16)),
    "head size 96": Program(Heads(7, 1, 96, 32, F16), soft_cap=5.0),
    "float32": Program(Heads(8, 1, 128, 128, F32)),
    "float32, wide": Program(Heads(4, 2, 256, 16, F32), window=1),
}
EXTEND_BATCHES = [
    [(n, n) for n in [1, 2, 3, 5, 7, 8, 63, 64, 65, 97, 127, 128, 129, 255]],
    [(64, 1000), (1, 700), (100, 1601), (3, 64), (2, 65), (17, 129), (128, 128), (200, 1201)],
    [(1, 1 + 5 * i) for i in range(35)] + [(700, 700), (90, 2048), (1, 3)],
]
EXTEND_ROOM = Room(1001, 6000, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXTENDING)
def test_on_a_gpu_extend_is_exact(rng, compiled, name):
    program = EXTENDING[name]
    heads, window, rows = program.heads, program.window, program.rows
    for lens in EXTEND_BATCHES:
        case = make_case(rng, mixed(rng, lens, rows), heads, room=EXTEND_ROOM, forgotten=window)
        check_extend(compiled["extend", name].result(), case, **program.masks)


PREPARED = [(how, name) for how in DECODE_BATCHES for name in DECODING]
PREPARED += [("extend", name) for name in EXTENDING]


@pytest.mark.parametrize(("kind", "name"), PREPARED)
def test_what_a_gpu_is_tested_with_lowers(kind, name):
    call, shapes = prepared(kind, name)
    text = lower_for_cuda(call, *shapes).as_text()
    assert "__gpu$xla.gpu.triton" in text
    assert ("merge" in text) == (kind == "cut")


@pytest.mark.parametrize("calling", [decoding, extending])
def test_what_else_the_cache_holds_does_not_matter(calling):
    heads = Heads(4, 2, 64, dtype=F32)
    lens = LENS if calling is extending else hostile(64)
    call = jax.jit(calling(heads, window=30, interpret=True))

    def result(fill: float) -> Any:
        rng = np.random.default_rng(1)
        return call(*make_case(rng, lens, heads, forgotten=30, fill=fill)[:3])

    for fill in (np.nan, np.inf):
        np.testing.assert_array_equal(result(fill), result(0.0))


def test_unsupported_arrays_are_refused_with_a_reason():
    good: dict[str, Any] = dict(head_size=128, group_size=4, page_size=64, dtype="bfloat16")
    for unsupported in (paged_decode_triton.unsupported, ragged_extend_triton.unsupported):
        assert unsupported(**good) is None
        for name, bad in (("head_size", 72), ("page_size", 8), ("dtype", "float8_e4m3fn")):
            assert f"not {bad}" in str(unsupported(**{**good, name: bad}))
    assert "not 17" in str(paged_decode_triton.unsupported(**{**good, "group_size": 17}))


@pytest.mark.parametrize("name", paged_decode_triton.SHAPES)
def test_production_shapes_of_decode_lower_for_cuda(name):
    B, N, K, H, kv_len, page_size = paged_decode_triton.SHAPES[name]
    heads, room = Heads(N, K, H, page_size), Room(B, B * kv_len, kv_len - page_size)
    text = lower_for_cuda(decoding(heads), *abstract(B, heads, room)).as_text()
    assert "__gpu$xla.gpu.triton" in text
    assert ("merge" in text) == (kv_len > 512)


@pytest.mark.parametrize("name", ragged_extend_triton.SHAPES)
def test_production_shapes_of_extend_lower_for_cuda(name):
    B, N, K, H, query_len, kv_len, page_size = ragged_extend_triton.SHAPES[name]
    heads, room = Heads(N, K, H, page_size), Room(B * query_len, B * kv_len, kv_len)
    text = lower_for_cuda(extending(heads), *abstract(B, heads, room)).as_text()
    assert "__gpu$xla.gpu.triton" in text
