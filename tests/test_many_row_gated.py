"""The gate of many rows against float64: tiles alone and in turns, uneven groups; then that what
models need lowers for a GPU, and is right there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import product_cases
import pytest
from cuda import compile_ahead, lower_for_cuda
from flax import nnx
from numerics import noise, to_float64
from product_cases import apply, make, run, sizes_of

from jaxengine.models.layers import Norm, gated
from jaxengine.pallas_kernels.dispatch import Kernels
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.many_row_gated import (
    SHAPES,
    default_config,
    many_row_gated,
    unsupported,
)
from jaxengine.pallas_kernels.many_row_kernel import GROUP, Config, num_tiles
from jaxengine.pallas_kernels.mosaic import BLOCKS

BF16 = jnp.bfloat16
ROWS = (128, 256, 512, 1024, 8192)
CONFIGS = {
    "a block for each tile": Config(tile_F=16, num_blocks=8),
    "turns": Config(tile_F=8, num_blocks=3),
    "a short ring": Config(tile_F=32, num_blocks=1, stages=1),
}


def gate(x: jax.Array, weight: jax.Array, *, eps: float, **how) -> jax.Array:
    return many_row_gated(x, weight, **how)


def check(shape: Shape, operands: dict[str, jax.Array], **how) -> None:
    product_cases.check(gate, gate, shape, operands, interpret=True, **how)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gate_is_exact(rng, name):
    shape = Shape(2, 256, 32, 192)
    check(shape, make(rng, shape, BF16, ""), config=CONFIGS[name])


def test_groups_of_tiles_may_be_uneven(rng):
    shape = Shape(2, (GROUP + 1) * 128, 16, 64)
    check(shape, make(rng, shape, BF16, ""), config=Config(tile_F=8, num_blocks=2))


def test_gates_far_from_zero(rng):
    x = jnp.zeros((128, 64), BF16).at[:, 0].set(jnp.linspace(-200, 200, 128, dtype=BF16))
    weight = jnp.zeros((2, 8, 64), BF16).at[:, :, 0].set(1)
    wide = to_float64(x[:, :1])
    exact = wide / (1 + np.exp(-wide)) * wide
    got = to_float64(run(gate, dict(x=x, weight=weight), interpret=True))
    np.testing.assert_allclose(got, np.broadcast_to(exact, got.shape), rtol=2**-7, atol=1e-30)


def test_a_row_does_not_depend_on_its_neighbours(rng):
    operands = make(rng, Shape(2, 128, 16, 128), BF16, "")
    out = run(gate, operands, interpret=True)
    poisoned = operands | {"x": operands["x"].at[70].set(jnp.nan)}
    again = run(gate, poisoned, interpret=True)
    others = np.arange(128) != 70
    np.testing.assert_array_equal(again[others], out[others])
    assert np.isnan(to_float64(again[70])).all()


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((64, 64, 64), BF16, "not 64"),
        ((192, 64, 64), BF16, "not 192"),
        ((128, 64, 96), BF16, "64 outputs of 96 inputs"),
        ((128, 60, 64), BF16, "60 outputs"),
        ((128, 64, 64), jnp.float16, "not float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(rng, sizes, dtype, reason):
    T, F, D = sizes
    assert reason in (unsupported(T=T, F=F, D=D, dtype=dtype) or "")
    with pytest.raises(ValueError, match=reason):
        run(gate, make(rng, Shape(2, T, F, D), dtype, ""), interpret=True)


def test_a_layer_takes_it_where_it_fits(rng):
    kernels = Kernels(hopper_products=True, interpret=True)
    norm = Norm(jnp.ones(64, BF16), 1e-6)
    weight = nnx.Param(jnp.asarray(noise(rng, (2, 24, 64), BF16, 0.1)))
    bias = nnx.Param(jnp.asarray(noise(rng, (2, 24), BF16)))
    for rows, biases, is_taken in ((128, None, True), (100, None, False), (128, bias, False)):
        x = jnp.asarray(noise(rng, (rows, 64), BF16))
        call = partial(gated, norm=norm, bias=biases)
        traced = jax.make_jaxpr(lambda x, call=call: call(x, weight, kernels=kernels))(x)
        assert ("smem" in str(traced)) == is_taken, "shared memory is a kernel's"
        got, expected = call(x, weight, kernels=kernels), call(x, weight)
        np.testing.assert_allclose(to_float64(got), to_float64(expected), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("rows", [1024, 8192])
@pytest.mark.parametrize("model", SHAPES)
def test_few_blocks_idle_at_the_end(model, rows):
    F, _ = SHAPES[model]
    config = default_config(rows, F)
    tiles = num_tiles(Shape(2, rows, F, 64), config)
    assert F % config.tile_F == 0
    assert tiles / (-(-tiles // BLOCKS) * BLOCKS) > 0.85


def prepared(model: str, rows: int):
    """A function of operands, and their shapes."""
    F, D = SHAPES[model]
    sizes = sizes_of(Shape(2, rows, F, D), "")
    shapes = {name: jax.ShapeDtypeStruct(size, BF16) for name, size in sizes.items()}
    return partial(apply, gate), [shapes]


@pytest.mark.parametrize("rows", [128, 8192])
@pytest.mark.parametrize("model", SHAPES)
def test_production_shapes_lower_for_a_gpu(model, rows):
    call, shapes = prepared(model, rows)
    assert "mosaic_gpu" in lower_for_cuda(call, *shapes).as_text()


@pytest.fixture(scope="module")
def compiled():
    keys = [(model, rows) for model in SHAPES for rows in ROWS]
    return compile_ahead({key: prepared(*key) for key in keys})


@pytest.mark.gpu
@pytest.mark.parametrize("model", SHAPES)
def test_production_shapes_are_exact_on_a_gpu(rng, compiled, model):
    """Weights of full size, since it decides on the tuning; of the outputs, some are compared."""
    if float(jax.devices()[0].compute_capability) != 9.0:
        pytest.skip("needs compute capability 9.0")
    programs = {rows: compiled[model, rows].result() for rows in ROWS}
    product_cases.check_some(rng, Shape(2, max(ROWS), *SHAPES[model]), "", programs)
