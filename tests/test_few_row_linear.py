"""The fused products against float64: every epilogue, sizes that no tile divides, every row count;
then that what models need compiles for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from numerics import assert_near_exact, to_float64

from jaxengine.pallas_kernels.few_row_linear import (
    SHAPES,
    Config,
    Shape,
    few_row_gated,
    few_row_linear,
    gated_reference,
    linear_reference,
    unsupported,
)

EPS = 1e-6
CONFIGS = {
    "one slice": Config(tile_F=4, tile_D=512, num_warps=1),
    "several slices": Config(tile_F=8, tile_D=64, num_warps=4),
}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def make(rng: np.random.Generator, shape: Shape, dtype, what: str) -> dict[str, jax.Array]:
    """Operands; `what` names those beyond x and weight."""
    M, B, F, D = shape
    sizes = dict(x=(B, D), weight=(M, F, D), norm_scale=(D,), bias=(M, F), residual=(B, F))
    scales = dict(x=3.0, weight=D**-0.5)
    return {
        name: jnp.asarray(rng.standard_normal(size) * scales.get(name, 1.0), dtype)
        for name, size in sizes.items()
        if name in ("x", "weight") or name in what
    }


def exact(x, weight, norm_scale=None, bias=None, residual=None) -> np.ndarray:
    if norm_scale is not None:
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS) * norm_scale
    sums = np.einsum("bd,mfd->mbf", x, weight)
    if bias is not None:
        sums = sums + bias[:, None]
    out = sums[0] if len(sums) == 1 else sums[0] / (1 + np.exp(-sums[0])) * sums[1]
    return out if residual is None else out + residual


def run(call, operands: dict[str, jax.Array], **how) -> jax.Array:
    """Calls one of the two functions, or its reference."""
    operands = dict(operands)
    weight = operands.pop("weight")
    if len(weight) == 1:
        weight = weight[0]
        operands |= {"bias": operands["bias"][0]} if "bias" in operands else {}
    return jax.jit(partial(call, eps=EPS, **how))(operands.pop("x"), weight, **operands)


def check(shape: Shape, operands: dict[str, jax.Array], **how) -> None:
    calls = (few_row_linear, linear_reference) if shape.M == 1 else (few_row_gated, gated_reference)
    got, naive = run(calls[0], operands, **how), run(calls[1], operands)
    wide = {name: to_float64(array) for name, array in operands.items()}
    assert_near_exact(got, exact(**wide), naive)


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


def can_launch_early() -> bool:
    """Whether the GPU here can."""
    return tuple(map(int, jax.devices()[0].compute_capability.split("."))) >= (9, 0)


PRODUCTS = [(model, product) for model, products in SHAPES.items() for product in products]


@pytest.mark.parametrize("launches_early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_lower_for_a_gpu(model, product, rows, launches_early):
    M, F, D = SHAPES[model][product]
    what = "norm_scale bias" if product in ("qkv", "gate_up") else "residual"
    arrays = dict(x=(rows, D), weight=(M, F, D), norm_scale=(D,), bias=(M, F), residual=(rows, F))
    operands = {
        name: jax.ShapeDtypeStruct(
            size[1:] if M == 1 and name in ("weight", "bias") else size, BF16
        )
        for name, size in arrays.items()
        if name in ("x", "weight") or name in what
    }
    call = few_row_linear if M == 1 else few_row_gated
    x, weight = operands.pop("x"), operands.pop("weight")
    call = partial(call, eps=EPS, launches_early=launches_early)
    assert "triton" in lower_for_cuda(call, x, weight, **operands).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("model", "product"), PRODUCTS)
def test_production_shapes_are_exact_on_a_gpu(rng, model, product, rows):
    M, F, D = SHAPES[model][product]
    shape = Shape(M, rows, min(F, 4099), D)
    what = "norm_scale bias" if product in ("qkv", "gate_up") else "residual"
    check(shape, make(rng, shape, BF16, what), launches_early=can_launch_early())
