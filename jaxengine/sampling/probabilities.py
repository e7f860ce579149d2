"""Log-probabilities of some tokens: of one, of the likeliest, of those asked about. The logits of
all tokens of a prompt are never in memory together: these come by blocks, or not at all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxengine.logprobs import Told

BLOCK_BYTES = 160 << 20  # logits of a block of prompt tokens, at most
GROUP = 128  # tokens of the vocabulary of which the largest logit is found first


def logprobs(
    logits: Float32[Array, "B V"],
    tokens: Int[Array, " B"],
    ids: Int[Array, "B n"],
    num_top: int,
) -> Told:
    """Log-softmax of each row at `tokens`, at the `num_top` largest, and at `ids`.

    Ids outside the vocabulary have that of some token in it.
    """
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    at = lambda places: jnp.take_along_axis(logits, places, axis=1, mode="clip") - norm
    top, top_ids = largest(logits, min(num_top, logits.shape[1]))
    return Told(at(tokens[:, None])[:, 0], top - norm, top_ids, at(ids))


def largest(
    logits: Float32[Array, "B V"], k: int
) -> tuple[Float32[Array, "B k"], Int32[Array, "B k"]]:
    """The `k` largest, descending, and where they are. They lie in the `k` groups whose largest are
    largest, so that little is sorted."""
    B, V = logits.shape
    if k == 0:
        return jnp.zeros((B, 0)), jnp.zeros((B, 0), jnp.int32)
    padded = jnp.pad(logits, ((0, 0), (0, -V % GROUP)), constant_values=-jnp.inf)
    grouped = padded.reshape(B, -1, GROUP)
    _, groups = lax.top_k(grouped.max(axis=2), min(k, grouped.shape[1]))
    members = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(B, -1)
    values, places = lax.top_k(members, k)
    group = jnp.take_along_axis(groups, places // GROUP, axis=1)
    return values, (group * GROUP + places % GROUP).astype(jnp.int32)


def logprobs_by_blocks(
    hidden: Float[Array, "T D"],
    project: Callable[[Float[Array, "block D"]], Float32[Array, "block V"]],
    tokens: Int[Array, " T"],
    ids: Int[Array, "T n"],
    num_top: int,
) -> Told:
    """`logprobs` of projected hidden states, with the logits of few of them in memory at a time."""
    T, block = len(hidden), block_size(jax.eval_shape(project, hidden).shape[1])
    if T <= block:
        return logprobs(project(hidden), tokens, ids, num_top)
    num_blocks = -(-T // block)

    def blocked(array: Array) -> Array:
        padded = jnp.pad(array, ((0, -T % block), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(num_blocks, block, *array.shape[1:])

    told = lax.map(
        lambda each: logprobs(project(each[0]), each[1], each[2], num_top),
        (blocked(hidden), blocked(tokens), blocked(ids)),
    )
    flat = num_blocks * block
    return jax.tree.map(lambda array: array.reshape(flat, *array.shape[2:])[:T], told)


def logprobs_of_some(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, " T"],
    tells: Bool[Array, " T"],
    normalizer: Callable[..., Any],
    num_top: int,
) -> Told:
    """`logprobs` of the hidden states that tell, times the head, and some numbers of the others;
    of no ids, and of one likeliest token at most. `normalizer` is the kernel `log_normalizer`."""
    T, number = len(hidden), jnp.cumsum(tells) - 1
    places = jnp.where(tells, number, T)
    telling = jnp.zeros(T, jnp.int32).at[places].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
    found = normalizer(hidden[telling], head, num_rows=number[-1] + 1)
    norm, peak, best = (each[jnp.maximum(number, 0)] for each in found)
    logits = jnp.einsum("td,td->t", hidden, head[tokens], preferred_element_type=jnp.float32)
    # Summed in another order than the norm, so that it may come out a little larger.
    of_token = jnp.where(tokens == best, peak, jnp.minimum(logits, peak)) - norm
    top = slice(None), slice(num_top)
    return Told(of_token, (peak - norm)[:, None][top], best[:, None][top], jnp.zeros((T, 0)))


def block_size(vocab_size: int) -> int:
    """Tokens of a block."""
    return 1 << max(3, (BLOCK_BYTES // (4 * vocab_size)).bit_length() - 1)
