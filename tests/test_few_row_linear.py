"""The fused products against float64: every epilogue, sizes that no tile divides, every row count;
then that what models need compiles for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import product_cases
import pytest
from cuda import compile_ahead, lower_for_cuda
from numerics import to_float64
from product_cases import apply, make, run, sizes_of, what_of

from jaxengine.pallas_kernels.few_row_linear import (
    SHAPES,
    Config,
    Shape,
    few_row_gated,
    few_row_linear,
    unsupported,
)

CONFIGS = {
    "one slice": Config(tile_F=4, tile_D=512, num_warps=1),
    "several slices": Config(tile_F=8, tile_D=64, num_warps=4),
}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def check(shape: Shape, operands: dict[str, jax.Array], **how) -> None:
    product_cases.check(few_row_linear, few_row_gated, shape, operands, **how)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("what", ["", "norm_scale", "bias", "residual", "norm_scale bias residual"])
def test_linear_is_exact(rng, what, name):
    shape = Shape(1, 3, 20, 256)
    check(shape, make(rng, shape, BF16, what), config=CONFIGS[name], interpret=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("what", ["", "norm_scale", "norm_scale bias"])
def test_gated_is_exact(rng, what, name):
    shape = Shape(2, 3, 20, 256)
    check(shape, make(rng, shape, BF16, what), config=CONFIGS[name], interpret=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("F", "D"), [(1, 1), (7, 127), (9, 129), (8, 256), (13, 520)])
def test_sizes_that_no_tile_divides_are_exact(rng, F, D, name):
    for shape in (Shape(1, 2, F, D), Shape(2, 2, F, D)):
        operands = make(rng, shape, BF16, "norm_scale bias")
        check(shape, operands, config=CONFIGS[name], interpret=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_every_number_of_rows_is_exact_with_the_default_tuning(rng, rows):
    shape = Shape(1, rows, 40, 300)
    check(shape, make(rng, shape, BF16, "norm_scale residual"), interpret=True)


@pytest.mark.parametrize("dtype", [F16, F32], ids=["f16", "f32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_other_dtypes_are_exact(rng, dtype, name):
    for shape in (Shape(1, 3, 20, 200), Shape(2, 3, 20, 200)):
        operands = make(rng, shape, dtype, "norm_scale")
        check(shape, operands, config=CONFIGS[name], interpret=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_large_stream_does_not_overflow_before_its_norm(rng, name):
    shape = Shape(1, 3, 20, 200)
    operands = make(rng, shape, F16, "norm_scale")
    operands |= {"x": operands["x"] * 3000, "norm_scale": operands["norm_scale"] * 30}
    check(shape, operands, config=CONFIGS[name], interpret=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_its_neighbours(rng, name):
    shape = Shape(1, 4, 12, 300)
    operands = make(rng, shape, BF16, "norm_scale")
    how = dict(config=CONFIGS[name], interpret=True)
    out = run(few_row_linear, operands, **how)
    poisoned = operands | {"x": operands["x"].at[2].set(jnp.nan)}
    again = run(few_row_linear, poisoned, **how)
    np.testing.assert_array_equal(again[jnp.array([0, 1, 3])], out[jnp.array([0, 1, 3])])
    assert np.isnan(to_float64(again[2])).all()


def test_what_the_kernel_cannot_do_is_refused_with_the_reason(rng):
    assert unsupported(shape=Shape(1, 4, 8, 8), dtype=BF16) is None
    assert "4 rows, not 5" in (unsupported(shape=Shape(1, 5, 8, 8), dtype=BF16) or "")
    assert "float64" in (unsupported(shape=Shape(1, 1, 8, 8), dtype=np.float64) or "")
    operands = make(rng, Shape(1, 5, 8, 8), BF16, "")
    with pytest.raises(ValueError, match="1 to 4 rows"):
        run(few_row_linear, operands, interpret=True)


PRODUCTS = [(model, product) for model, products in SHAPES.items() for product in products]


def prepared(model: str, product: str, rows: int, launches_early: bool):
    """A function of operands, and their shapes."""
    M, F, D = SHAPES[model][product]
    call = partial(few_row_linear if M == 1 else few_row_gated, launches_early=launches_early)
    what = what_of(product)
    shapes = {
        name: jax.ShapeDtypeStruct(size, BF16)
        for name, size in sizes_of(Shape(M, rows, F, D), what).items()
    }
    return partial(apply, call), [shapes]


@pytest.mark.parametrize("launches_early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_lower_for_a_gpu(model, product, rows, launches_early):
    call, shapes = prepared(model, product, rows, launches_early)
    assert "triton" in lower_for_cuda(call, *shapes).as_text()


@pytest.fixture(scope="module")
def compiled():
    """Some of them with launches that only newer GPUs know."""
    can = float(jax.devices()[0].compute_capability) >= 9
    keys = [(*product, rows) for product in PRODUCTS for rows in range(1, 5)]
    return compile_ahead({key: prepared(*key, can and key[-1] < 4) for key in keys})


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_are_exact_on_a_gpu(rng, compiled, model, product):
    """Weights of full size, since it decides on the tuning; of the outputs, some are compared."""
    M, F, D = SHAPES[model][product]
    programs = {rows: compiled[model, product, rows].result() for rows in range(1, 5)}
    product_cases.check_some(rng, Shape(M, 4, F, D), what_of(product), programs)
