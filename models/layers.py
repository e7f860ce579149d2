"""What every family is made of: parameters with named axes, normalisation, matrix products.
It knows arrays, not layers of a particular model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.pallas_kernels.dispatch import XLA, Kernels, fused_product, many_row_gated
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape


class Parameters(NamedTuple):
    """Makes parameters: each is declared as `axis=size, ...`, and carries those names as `axes`."""

    rngs: nnx.Rngs
    dtype: jnp.dtype

    def weight(self, **axes: int) -> nnx.Param:
        shape = tuple(axes.values())
        noise = jax.random.normal(self.rngs.params(), shape, self.dtype)
        return nnx.Param(noise * jnp.asarray(0.02, self.dtype), axes=tuple(axes))

    def bias(self, **axes: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(tuple(axes.values()), self.dtype), axes=tuple(axes))

    def scale(self, **axes: int) -> nnx.Param:
        return nnx.Param(jnp.ones(tuple(axes.values()), self.dtype), axes=tuple(axes))


class Norm(NamedTuple):
    """Root-mean-square normalisation with its parameters."""

    scale: Float[Array, " D"]
    eps: float

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.scale, eps=self.eps)


def rms_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "*rows D"]:
    """x / rms(x) * scale. The quotient is float32, rounded before it is scaled."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, range(x.ndim - 1))


def layer_norm(
    x: Float[Array, "T D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, eps: float
) -> Float[Array, "T D"]:
    """(x - mean) / standard deviation * scale + bias, in float32, then rounded.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return (normed * scale[None] + bias[None]).astype(x.dtype)


def linear(
    x: Float[Array, "T D"],
    weight: nnx.Param,
    *,
    norm: Norm | None = None,
    bias: nnx.Param | None = None,
    residual: Float[Array, "T F"] | None = None,
    kernels: Kernels = XLA,
) -> Float[Array, "T F"]:
    """weight (normed x) + bias, rounded, + residual. Summed in float32.

    The last axes of the weight, as many as make up `D`, are the input; those before, flat, `F`.
    """
    matrix = weight[...].reshape(-1, x.shape[1])
    flat_bias = None if bias is None else bias[...].reshape(-1)
    if product := fused_product(kernels, Shape(1, len(x), *matrix.shape), x.dtype):
        return product(x, matrix, bias=flat_bias, residual=residual, **_norm(norm))
    normed = x if norm is None else norm(x)
    # A bias joins before the sums are rounded; without one the product may round them itself.
    sum_dtype = x.dtype if flat_bias is None else jnp.float32
    out = jnp.einsum("td,fd->tf", normed, matrix, preferred_element_type=sum_dtype)
    if flat_bias is not None:
        out = (out + flat_bias.astype(jnp.float32)[None]).astype(x.dtype)
    return out if residual is None else residual + out


def gated(
    x: Float[Array, "T D"],
    gate_up: nnx.Param,  # [2 F D]
    *,
    norm: Norm | None = None,
    bias: nnx.Param | None = None,  # [2 F]
    kernels: Kernels = XLA,
) -> Float[Array, "T F"]:
    """silu(gate x) * up x, of the normed x."""
    shape = Shape(2, len(x), *gate_up.shape[1:])
    if product := fused_product(kernels, shape, x.dtype):
        return product(x, gate_up[...], bias=None if bias is None else bias[...], **_norm(norm))
    normed = x if norm is None else norm(x)
    if bias is None and (product := many_row_gated(kernels, shape, x.dtype)):
        return product(normed, gate_up[...])
    gate, up = jnp.split(linear(normed, gate_up, bias=bias), 2, axis=1)
    return jax.nn.silu(gate) * up


def project(hidden: Float[Array, "B D"], head: nnx.Param) -> Float[Array, "B V"]:
    """Float32 logits: the head's rows times each hidden state."""
    return jnp.einsum("bd,vd->bv", hidden, head[...], preferred_element_type=jnp.float32)


def _norm(norm: Norm | None) -> dict[str, Any]:
    return dict(norm_scale=norm and norm.scale, eps=norm.eps if norm else 0.0)
