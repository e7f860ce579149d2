"""Products of a decoder layer: operands, what is exact, and how a kernel's two functions are
called on them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numerics import assert_near_exact, noise, to_float64

from jaxengine.pallas_kernels.few_row_linear import gated_reference, linear_reference
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape

EPS = 1e-6
SOME = 2000  # outputs that are compared where weights are of full size
CUT = ("weight", "bias", "residual")  # those with outputs in their second axis


def make(rng: np.random.Generator, shape: Shape, dtype, what: str) -> dict[str, jax.Array]:
    """Operands; `what` names those beyond x and weight."""
    scales = dict(x=3.0, weight=shape.D**-0.5)
    return {
        name: jnp.asarray(noise(rng, size, dtype, scales.get(name, 1.0)))
        for name, size in sizes_of(shape, what).items()
    }


def exact(x, weight, norm_scale=None, bias=None, residual=None) -> np.ndarray:
    if norm_scale is not None:
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS) * norm_scale
    sums = x @ weight.swapaxes(1, 2)
    if bias is not None:
        sums = sums + bias[:, None]
    out = sums[0] if len(sums) == 1 else sums[0] / (1 + np.exp(-sums[0])) * sums[1]
    return out if residual is None else out + residual


def apply(call, operands: dict[str, Any]) -> jax.Array:
    """Calls one of the two functions, or its reference."""
    operands = dict(operands)
    weight = operands.pop("weight")
    if len(weight) == 1:
        weight = weight[0]
        operands |= {"bias": operands["bias"][0]} if "bias" in operands else {}
    return call(operands.pop("x"), weight, **operands, eps=EPS)


def run(call, operands: dict[str, Any], **how) -> jax.Array:
    return jax.jit(partial(apply, partial(call, **how)))(operands)


def check(
    linear: Callable[..., jax.Array],
    gated: Callable[..., jax.Array],
    shape: Shape,
    operands: dict[str, jax.Array],
    **how: Any,
) -> None:
    """That whichever of the two it is, is as near to what is exact as plain XLA."""
    call, reference = (linear, linear_reference) if shape.M == 1 else (gated, gated_reference)
    got, naive = run(call, operands, **how), run(reference, operands)
    wide = {name: to_float64(array) for name, array in operands.items()}
    assert_near_exact(got, exact(**wide), naive)


def sizes_of(shape: Shape, what: str) -> dict[str, tuple[int, ...]]:
    """Those of the operands; `what` names those beyond x and weight."""
    M, B, F, D = shape
    sizes = dict(x=(B, D), weight=(M, F, D), norm_scale=(D,), bias=(M, F), residual=(B, F))
    return {name: size for name, size in sizes.items() if name in ("x", "weight") or name in what}


def what_of(product: str) -> str:
    """What stands around a product of a layer."""
    return "norm_scale bias" if product in ("qkv", "gate_up") else "residual"


def check_some(
    rng: np.random.Generator,
    shape: Shape,
    what: str,
    programs: Mapping[int, Callable[[dict[str, Any]], jax.Array]],
) -> None:
    """The same of some outputs, for programs of the first so many rows of `shape`."""
    operands = make(rng, shape, jnp.bfloat16, what)
    some = np.unique([0, shape.F - 1, *rng.integers(0, shape.F, SOME)])
    host = {name: np.asarray(array) for name, array in operands.items()}
    few = {name: a[:, some] if name in CUT else a for name, a in host.items()}
    right = exact(**{name: to_float64(array) for name, array in few.items()})
    with jax.default_device(jax.devices("cpu")[0]):
        naive = np.asarray(run(linear_reference if shape.M == 1 else gated_reference, few))
    for rows, program in programs.items():
        own = {name: host[name][:rows] for name in ("x", "residual") if name in host}
        got = np.asarray(program(operands | own))[:, some]
        names = [f"row {row} of {rows}" for row in range(rows)]
        assert_near_exact(got, right[:rows], naive[:rows], rows=names)
