"""Norm, rotation and cache write in one kernel against float64, in a cache full of NaN; then that
what models need compiles for a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import compile_ahead, lower_for_cuda
from numerics import assert_near_exact, noise, to_float64

from jaxengine.pallas_kernels.rotate_and_write import (
    SHAPES,
    Config,
    Shape,
    reference,
    rotate_and_write,
    unsupported,
)

EPS = 1e-6
PAGE, PAGES = 4, 9
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def make(
    rng: np.random.Generator, shape: Shape, dtype, *, norms: bool, page_size: int = PAGE
) -> dict[str, jax.Array]:
    """Arguments of a call: tokens over shuffled places, some of them beyond the cache."""
    T, K, G, H = shape
    num_pages = max(PAGES, T // page_size + 1)
    places = rng.permutation(num_pages * page_size)[:T]
    page_ids = np.where(rng.random(T) < 0.2, num_pages + np.arange(T), places // page_size)
    angles = rng.uniform(0, 2 * np.pi, (T, H // 2))
    floats = dict(
        qkv=noise(rng, (T, K, G + 2, H), dtype, scale=3.0),
        cache=np.full((num_pages, 2, K, page_size, H), np.nan),
        cos=np.cos(angles),
        sin=np.sin(angles),
    )
    if norms:
        floats |= dict(q_norm=rng.standard_normal(H), k_norm=rng.standard_normal(H))
    ints = dict(page_ids=page_ids, offsets=places % page_size)
    arrays = {name: value.astype(dtype) for name, value in floats.items()}
    arrays |= {name: value.astype(np.int32) for name, value in ints.items()}
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def exact(qkv, cache, cos, sin, page_ids, offsets, q_norm=None, k_norm=None):
    """Queries, and K and V of each token, in float64."""

    def turned(x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        if scale is not None:
            x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    T, _, _, H = qkv.shape
    q = turned(qkv[:, :, :-2].reshape(T, -1, H), q_norm)
    return q, np.stack([turned(qkv[:, :, -2], k_norm), qkv[:, :, -1]], axis=1)


def apply(call, case: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    case = dict(case)
    qkv, cache = case.pop("qkv"), case.pop("cache")
    return call(qkv, cache, **case, eps=EPS)


def run(call, case: dict[str, Any], **how) -> tuple[jax.Array, jax.Array]:
    return jax.jit(partial(apply, partial(call, **how)))(case)


def check(case: dict[str, jax.Array], **how) -> None:
    compare(run(rotate_and_write, case, **how), case)


def compare(got: tuple[jax.Array, jax.Array], case: dict[str, jax.Array]) -> None:
    """Compares queries, what was written, and that the rest of the cache is still NaN."""
    with jax.default_device(jax.devices("cpu")[0]):
        naive = run(reference, {name: np.asarray(value) for name, value in case.items()})
    q, kv = exact(**{name: to_float64(value) for name, value in case.items()})
    assert_near_exact(got[0], q, naive[0], rows=[f"q of token {i}" for i in range(len(q))])
    page_ids, offsets = np.asarray(case["page_ids"]), np.asarray(case["offsets"])
    kept = page_ids < len(case["cache"])
    page_ids, offsets = page_ids[kept], offsets[kept]
    places = (page_ids, slice(None), slice(None), offsets)
    got_cache, naive_cache = np.array(got[1]), np.array(naive[1])
    names = [f"K and V of token {i}" for i in np.flatnonzero(kept)]
    assert_near_exact(got_cache[places], kv[kept], naive_cache[places], rows=names)
    got_cache[places] = np.nan
    assert np.isnan(to_float64(got_cache)).all()


@pytest.mark.parametrize(
    ("G", "H", "norms"),
    [(1, 64, True), (7, 64, False), (4, 80, True), (8, 96, False), (2, 128, True), (4, 256, True)],
)
def test_every_head_size_and_group_is_exact(rng, G, H, norms):
    check(make(rng, Shape(5, 2, G, H), BF16, norms=norms), interpret=True)


@pytest.mark.parametrize("dtype", [F16, F32], ids=["f16", "f32"])
def test_other_dtypes_are_exact(rng, dtype):
    check(make(rng, Shape(5, 2, 3, 32), dtype, norms=True), interpret=True)


@pytest.mark.parametrize("T", [1, PAGE + 1, 13])
@pytest.mark.parametrize(("K", "tile_K"), [(1, 1), (3, 1), (3, 2), (3, 4)])
def test_every_number_of_tokens_and_tile_of_heads_is_exact(rng, T, K, tile_K):
    config = Config(tile_K=tile_K, num_warps=1)
    check(make(rng, Shape(T, K, 2, 8), BF16, norms=True), config=config, interpret=True)


def test_many_tokens_are_exact(rng):
    check(make(rng, Shape(67, 3, 2, 16), BF16, norms=True), interpret=True)


def test_a_cache_may_be_wider_than_the_activations(rng):
    case = make(rng, Shape(5, 2, 3, 32), BF16, norms=True)
    check(case | {"cache": case["cache"].astype(F32)}, interpret=True)


def test_dropped_tokens_write_nothing(rng):
    case = make(rng, Shape(3, 2, 2, 16), BF16, norms=False)
    case |= {"page_ids": jnp.asarray([PAGES, PAGES + 1, 10**9], jnp.int32)}
    _, cache = run(rotate_and_write, case, interpret=True)
    assert np.isnan(to_float64(cache)).all()


def test_what_the_kernel_cannot_do_is_refused_with_the_reason(rng):
    assert unsupported(head_size=80, group_size=7) is None
    assert "even" in (unsupported(head_size=81, group_size=1) or "")
    assert "query heads" in (unsupported(head_size=64, group_size=0) or "")
    case = make(rng, Shape(1, 1, 1, 7), BF16, norms=False)
    with pytest.raises(ValueError, match="even"):
        run(rotate_and_write, case, interpret=True)


@pytest.mark.parametrize("launches_early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("T", [1, 64, 16384])
@pytest.mark.parametrize("model", SHAPES)
def test_production_shapes_lower_for_a_gpu_and_write_in_place(model, T, launches_early):
    shape = Shape(T, **SHAPES[model])
    cache = jax.ShapeDtypeStruct((4096, 2, shape.K, 64, shape.H), BF16)
    qkv = jax.ShapeDtypeStruct((T, shape.K, shape.G + 2, shape.H), BF16)
    angles = jax.ShapeDtypeStruct((T, shape.H // 2), BF16)
    ids = jax.ShapeDtypeStruct((T,), jnp.int32)
    norm = jax.ShapeDtypeStruct((shape.H,), BF16)
    how = dict(cos=angles, sin=angles, page_ids=ids, offsets=ids, q_norm=norm, k_norm=norm)
    call = partial(rotate_and_write, eps=EPS, launches_early=launches_early)
    text = lower_for_cuda(call, qkv, cache, donate=1, **how).as_text()
    assert "triton" in text and "output_operand_alias" in text


# Of every model and of every size, once with head norms and once without; tokens as steps have.
ON_GPU = {
    f"{model} {T}": (Shape(T, **SHAPES[model]), (i + j) % 2 == 0, 64)
    for i, model in enumerate(SHAPES)
    for j, T in enumerate((1, 64, 65, 500))
} | {
    f"G {G}, H {H}": (Shape(T, 3, G, H), T == 5, PAGE)
    for H, groups in {64: (1, 8), 80: (7, 4), 96: (8, 1), 128: (7, 1), 256: (4, 8)}.items()
    for G, T in zip(groups, (5, 100), strict=True)
}


def make_on_gpu(name: str) -> dict[str, jax.Array]:
    shape, norms, page_size = ON_GPU[name]
    return make(np.random.default_rng(0), shape, BF16, norms=norms, page_size=page_size)


@pytest.fixture(scope="module")
def compiled():
    """Some of them with launches that only newer GPUs know."""
    can = float(jax.devices()[0].compute_capability) >= 9
    calls = {
        name: partial(rotate_and_write, launches_early=can and shape.T != 64)
        for name, (shape, *_) in ON_GPU.items()
    }
    return compile_ahead(
        {name: (partial(apply, call), [make_on_gpu(name)]) for name, call in calls.items()}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_is_exact(compiled, name):
    case = make_on_gpu(name)
    compare(compiled[name].result()(case), case)
