"""What every family is made of: parameters with named axes, normalisation, matrix product.
It knows arrays, not layers of a particular model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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


def rms_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "*rows D"]:
    """x / rms(x) * scale. The quotient is float32, rounded before it is scaled."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, range(x.ndim - 1))


def linear(
    spec: str, x: Float[Array, "..."], weight: nnx.Param, bias: nnx.Param | None = None
) -> Float[Array, "..."]:
    """The einsum of activations and a weight, plus bias: summed in float32, rounded once."""
    out = jnp.einsum(spec, x, weight[...], preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + bias[...].astype(jnp.float32)[None]
    return out.astype(x.dtype)
