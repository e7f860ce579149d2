"""The fused products of small batches against float64: every epilogue, slices in turns and alone,
row counts; then that what models need lowers for a GPU, and is right there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import product_cases
import pytest
from cuda import compile_ahead, lower_for_cuda
from flax import nnx
from numerics import noise, to_float64
from product_cases import apply, make, run, sizes_of, what_of

from jaxengine.models.layers import Norm, gated, linear
from jaxengine.pallas_kernels.dispatch import Kernels
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape
from jaxengine.pallas_kernels.mosaic import BLOCKS, SHARED_MEMORY
from jaxengine.pallas_kernels.small_batch_linear import (
    SHAPES,
    default_config,
    small_batch_gated,
    small_batch_linear,
    unsupported,
)
from jaxengine.pallas_kernels.small_batch_linear_kernel import shared_memory
from jaxengine.pallas_kernels.small_batch_linear_producer import Config

BF16 = jnp.bfloat16
CONFIGS = {
    "two consumers": Config(tile_F=8, tile_D=64, stages=4),
    "a short ring": Config(tile_F=16, tile_D=64, stages=2),
    "one consumer": Config(tile_F=16, tile_D=128, stages=2, consumers=1),
}
ROWS = (1, 2, 8, 16, 32, 64)


def check(shape: Shape, operands: dict[str, jax.Array], **how) -> None:
    how |= dict(interpret=True)
    product_cases.check(small_batch_linear, small_batch_gated, shape, operands, **how)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("what", ["", "norm_scale", "bias residual", "norm_scale bias residual"])
def test_linear_is_exact(rng, what, name):
    shape = Shape(1, 16, 32, 384)
    check(shape, make(rng, shape, BF16, what), config=CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("what", ["", "norm_scale bias"])
def test_gated_is_exact(rng, what, name):
    shape = Shape(2, 8, 32, 384)
    check(shape, make(rng, shape, BF16, what), config=CONFIGS[name])


@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows_is_exact_with_the_default_tuning(rng, rows):
    shape = Shape(1, rows, 24, 320)
    check(shape, make(rng, shape, BF16, "norm_scale residual"))


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_are_exact_gated_and_without_a_norm(rng, rows):
    for shape, what in ((Shape(1, rows, 8, 128), ""), (Shape(2, rows, 8, 128), "norm_scale bias")):
        check(shape, make(rng, shape, BF16, what))


def test_a_single_slice_is_exact(rng):
    for shape in (Shape(1, 8, 16, 64), Shape(2, 8, 16, 64)):
        check(shape, make(rng, shape, BF16, "norm_scale"))


def test_a_row_does_not_depend_on_its_neighbours(rng):
    for rows, bad in ((8, 2), (2, 1)):
        operands = make(rng, Shape(1, rows, 16, 256), BF16, "norm_scale")
        out = run(small_batch_linear, operands, interpret=True)
        poisoned = operands | {"x": operands["x"].at[bad].set(jnp.nan)}
        again = run(small_batch_linear, poisoned, interpret=True)
        others = np.arange(rows) != bad
        np.testing.assert_array_equal(again[others], out[others])
        assert np.isnan(to_float64(again[bad])).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (Shape(1, 4, 64, 64), BF16, "not 4"),
        (Shape(1, 12, 64, 64), BF16, "not 12"),
        (Shape(1, 128, 64, 64), BF16, "not 128"),
        (Shape(1, 8, 64, 96), BF16, "64 outputs of 96 inputs"),
        (Shape(1, 8, 60, 64), BF16, "60 outputs"),
        (Shape(2, 8, 132 * 136, 64), BF16, "no tiles"),
        (Shape(1, 8, 64, 64), jnp.float16, "not float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(rng, shape, dtype, reason):
    assert reason in (unsupported(shape=shape, dtype=dtype) or "")
    call = small_batch_linear if shape.M == 1 else small_batch_gated
    with pytest.raises(ValueError, match=reason):
        run(call, make(rng, shape._replace(D=shape.D), dtype, ""), interpret=True)


def test_a_layer_takes_them_where_they_fit(rng):
    kernels = Kernels(hopper_products=True, interpret=True)
    norm = Norm(jnp.ones(64, BF16), 1e-6)
    weight, both = (
        nnx.Param(jnp.asarray(noise(rng, size, BF16, 0.1))) for size in ((24, 64), (2, 24, 64))
    )
    bias, biases = (nnx.Param(jnp.asarray(noise(rng, size, BF16))) for size in ((24,), (2, 24)))
    for rows, is_taken in ((8, True), (64, True), (7, False), (128, False)):
        x = jnp.asarray(noise(rng, (rows, 64), BF16))
        call = partial(linear, norm=norm, bias=bias, residual=x[:, :24])
        gate = partial(gated, norm=norm, bias=biases)
        for of, by in ((call, weight), (gate, both)):
            traced = jax.make_jaxpr(lambda x, of=of, by=by: of(x, by, kernels=kernels))(x)
            assert ("smem" in str(traced)) == is_taken, "shared memory is a kernel's"
            got, expected = of(x, by, kernels=kernels), of(x, by)
            np.testing.assert_allclose(to_float64(got), to_float64(expected), atol=0.03, rtol=0.02)


PRODUCTS = [(model, product) for model, products in SHAPES.items() for product in products]


def prepared(model: str, product: str, rows: int):
    """A function of operands, and their shapes."""
    M, F, D = SHAPES[model][product]
    call = small_batch_linear if M == 1 else small_batch_gated
    sizes = sizes_of(Shape(M, rows, F, D), what_of(product))
    shapes = {name: jax.ShapeDtypeStruct(size, BF16) for name, size in sizes.items()}
    return partial(apply, call), [shapes]


@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_the_blocks_of_production_shapes_fit_on_the_chip(model, product):
    M, F, D = SHAPES[model][product]
    for has_norm, rows in ((False, 64), (True, 64), (False, 1), (True, 2)):
        shape = Shape(M, rows, F, D)
        config = default_config(shape, has_norm=has_norm)
        assert F % config.tile_F == D % config.tile_D == config.stages % config.consumers == 0
        assert F // config.tile_F <= BLOCKS and config.stages >= 2
        assert shared_memory(shape, config) <= SHARED_MEMORY


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_lower_for_a_gpu(model, product, rows):
    call, shapes = prepared(model, product, rows)
    assert "mosaic_gpu" in lower_for_cuda(call, *shapes).as_text()


@pytest.fixture(scope="module")
def compiled():
    keys = [(*product, rows) for product in PRODUCTS for rows in ROWS]
    return compile_ahead({key: prepared(*key) for key in keys})


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_are_exact_on_a_gpu(rng, compiled, model, product):
    """Weights of full size, since it decides on the tuning; of the outputs, some are compared."""
    if float(jax.devices()[0].compute_capability) != 9.0:
        pytest.skip("needs compute capability 9.0")
    M, F, D = SHAPES[model][product]
    programs = {rows: compiled[model, product, rows].result() for rows in ROWS}
    product_cases.check_some(rng, Shape(M, max(ROWS), F, D), what_of(product), programs)
