"""What makes logits log-probabilities against float64: tiles that overlap, rows that do not count,
logits far from zero; then that what models need lowers for a GPU, and is right there."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import compile_ahead, lower_for_cuda
from flax import nnx
from numerics import noise, to_float64

from jaxengine.models.layers import project
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.pallas_kernels.dispatch import log_normalizer as chosen
from jaxengine.pallas_kernels.log_normalizer import (
    SHAPES,
    Normalizer,
    log_normalizer,
    reference,
    unsupported,
)
from jaxengine.pallas_kernels.many_row_kernel import GROUP, Config
from jaxengine.sampling import logprobs_by_blocks, logprobs_of_some

BF16 = jnp.bfloat16
TOLERANCE = 1e-4
CONFIGS = {
    "a block for each tile": Config(tile_F=32, num_blocks=5),
    "turns": Config(tile_F=24, num_blocks=3),
    "a short ring": Config(tile_F=64, num_blocks=1, stages=1),
}


def make(rng: np.random.Generator, T: int, V: int, D: int) -> tuple[jax.Array, jax.Array]:
    """Hidden states and a head, whose logits spread over some ten whatever D is."""
    hidden, head = noise(rng, (T, D), BF16, 3.0), noise(rng, (V, D), BF16, 1.3 * D**-0.5)
    return jnp.asarray(hidden), jnp.asarray(head)


def run(hidden: jax.Array, head: jax.Array, num_rows: int | None = None, **how: Any) -> Normalizer:
    call = jax.jit(partial(log_normalizer, interpret=True, **how))
    return call(hidden, head, num_rows=jnp.int32(len(hidden) if num_rows is None else num_rows))


def check(got: Normalizer, logits: np.ndarray) -> None:
    peak = logits.max(axis=1)
    norm = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    np.testing.assert_allclose(got.norm, norm, atol=TOLERANCE, rtol=1e-6)
    np.testing.assert_allclose(got.peak, peak, atol=TOLERANCE, rtol=1e-6)
    at_best = np.take_along_axis(logits, np.asarray(got.best)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(at_best, peak, atol=TOLERANCE, rtol=1e-6)


def logits_of(hidden: jax.Array, head: jax.Array) -> np.ndarray:
    return to_float64(hidden) @ to_float64(head).T


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_exact(rng, name):
    arrays = make(rng, 128 if CONFIGS[name].num_blocks > 3 else 256, 104, 128)
    got = run(*arrays, config=CONFIGS[name])
    check(got, logits_of(*arrays))
    check(reference(*arrays), logits_of(*arrays))
    np.testing.assert_array_equal(got.best, reference(*arrays).best)


@pytest.mark.parametrize("num_rows", [0, 129, (GROUP + 1) * 128])
def test_rows_that_do_not_count_take_no_turn(rng, num_rows):
    hidden, head = make(rng, (GROUP + 1) * 128, 32, 64)
    got = run(hidden, head, num_rows, config=Config(tile_F=16, num_blocks=4))
    counting = slice(num_rows)
    check(Normalizer(*(each[counting] for each in got)), logits_of(hidden[counting], head))


def test_logits_far_from_zero_and_equal_ones(rng):
    hidden = jnp.zeros((128, 64), BF16).at[:, 0].set(jnp.linspace(-3000, 3000, 128, dtype=BF16))
    head = jnp.zeros((40, 64), BF16).at[:, 0].set(1).at[39, 0].set(-1)
    got = run(hidden, head, config=Config(tile_F=16, num_blocks=2))
    check(got, logits_of(hidden, head))
    np.testing.assert_array_equal(got.best, np.where(to_float64(hidden[:, 0]) >= 0, 0, 39))


def test_what_is_not_finite_stays_with_its_token(rng):
    hidden, head = make(rng, 128, 64, 64)
    how: dict[str, Any] = dict(config=Config(tile_F=32, num_blocks=2))
    right = run(hidden, head, **how)
    got = run(hidden.at[70].set(jnp.nan), head, **how)
    others = np.arange(128) != 70
    np.testing.assert_array_equal(got.norm[others], right.norm[others])
    assert np.isnan(got.norm[70])


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((64, 512, 64), BF16, "not 64"),
        ((0, 512, 64), BF16, "not 0"),
        ((128, 255, 64), BF16, "255 logits"),
        ((128, 248, 64), BF16, "248 logits"),
        ((128, 512, 96), BF16, "512 logits of 96 inputs"),
        ((128, 512, 64), jnp.float32, "not float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(sizes, dtype, reason):
    T, V, D = sizes
    assert reason in (unsupported(T=T, V=V, D=D, dtype=dtype) or "")
    kernels = Kernels(hopper_products=True, interpret=True)
    assert chosen(kernels, T, V, D, dtype) is None
    with pytest.raises(ValueError, match=reason):
        run(jnp.zeros((T, D), dtype), jnp.zeros((V, D), dtype))


@pytest.mark.parametrize("num_top", [0, 1])
def test_the_tokens_that_tell_are_told_the_same_as_by_blocks(rng, num_top):
    T, V = 128, 264
    hidden, head = make(rng, T, V, 64)
    tokens, tells = jnp.asarray(rng.integers(0, V, T), jnp.int32), jnp.asarray(rng.random(T) < 0.3)
    tokens = tokens.at[::2].set(reference(hidden, head).best[::2])  # as where text is likely
    kernels = Kernels(hopper_products=True, interpret=True)
    normalizer = chosen(kernels, T, V, 64, BF16)
    assert normalizer is not None and chosen(XLA, T, V, 64, BF16) is None
    got = logprobs_of_some(hidden, head, tokens, tells, normalizer, num_top)
    nothing = jnp.zeros((T, 0), jnp.int32)
    right = logprobs_by_blocks(
        hidden, lambda x: project(x, nnx.Param(head)), tokens, nothing, num_top
    )
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, right)
    for ours, theirs in zip(got, right, strict=True):
        np.testing.assert_allclose(ours[tells], theirs[tells], atol=TOLERANCE)
    assert (got.of_token[tells] <= 0).all()
    is_best = np.asarray(tells & (tokens == reference(hidden, head).best))
    if num_top:
        np.testing.assert_array_equal(got.of_token[is_best], got.top[is_best, 0])


def prepared(model: str, T: int):
    V, D = SHAPES[model]
    shapes = [jax.ShapeDtypeStruct(size, BF16) for size in ((T, D), (V, D))]
    call = lambda hidden, head, num_rows: log_normalizer(hidden, head, num_rows=num_rows)
    return call, [*shapes, jax.ShapeDtypeStruct((), jnp.int32)]


@pytest.mark.parametrize("T", [128, 8192])
@pytest.mark.parametrize("model", SHAPES)
def test_production_shapes_lower_for_a_gpu(model, T):
    call, shapes = prepared(model, T)
    assert "mosaic_gpu" in lower_for_cuda(call, *shapes).as_text()
    assert unsupported(T=T, V=SHAPES[model][0], D=SHAPES[model][1], dtype=BF16) is None


@pytest.fixture(scope="module")
def compiled():
    return compile_ahead({model: prepared(model, 1024) for model in SHAPES})


@pytest.mark.gpu
@pytest.mark.parametrize("model", SHAPES)
def test_production_shapes_are_exact_on_a_gpu(rng, compiled, model):
    if float(jax.devices()[0].compute_capability) != 9.0:
        pytest.skip("needs compute capability 9.0")
    hidden, head = make(rng, 1024, *SHAPES[model])
    few = np.unique(rng.integers(0, 700, 40))
    right = logits_of(hidden[few], head)
    for num_rows in (1024, 700):
        got = compiled[model].result()(hidden, head, jnp.int32(num_rows))
        check(Normalizer(*(each[few] for each in got)), right)
