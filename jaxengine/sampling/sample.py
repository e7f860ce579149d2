"""One token for each row of logits that need no more adjusting: temperature, top-k and top-p
together, min-p, the draw. It knows nothing of what becomes of the token."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from jaxengine.sampling.draw import draw
from jaxengine.sampling.state import SamplingState

UNUSABLE = -1
"""Instead of a token, where the logits define none."""


def sample(
    logits: Float32[Array, "B V"],
    params: SamplingState,
    positions: Int[Array, " B"],
    *,
    implementation: str = "xla",
    interpret: bool = False,
) -> Int32[Array, " B"]:
    """The token of each row at its position, the argmax where its temperature is 0.

    A row gets UNUSABLE if its logits hold NaN or +inf or are all -inf. No row depends on another.
    The implementations, "xla" and "triton", draw the same tokens up to rounding; `interpret` runs
    the latter on a CPU.
    """
    if implementation == "xla":
        return sample_rows(logits, params, positions)
    # Imported when it is needed: Pallas takes time, and many a run needs none of it.
    from jaxengine.pallas_kernels import sample as kernel

    return kernel.sample_rows(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        positions=positions,
        interpret=interpret,
    )


def sample_rows(
    logits: Float32[Array, "B V"], params: SamplingState, positions: Int[Array, " B"]
) -> Int32[Array, " B"]:
    """`sample` in plain XLA."""
    likeliest = jnp.argmax(logits, axis=1).astype(jnp.int32)
    is_random = params.temperature > 0
    drawn = lax.cond(is_random.any(), lambda: draw(logits, params, positions), lambda: likeliest)
    usable = jnp.isfinite(logits.max(axis=1)) & ~jnp.isnan(logits).any(axis=1)
    return jnp.where(usable, jnp.where(is_random, drawn, likeliest), UNUSABLE)
