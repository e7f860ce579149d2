"""Which tokens a row may have at all, as packed bits: how grammars reach the device."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

BITS = 32


def num_words(vocab_size: int) -> int:
    """Length of a row of packed bits."""
    return -(-vocab_size // BITS)


def everything(num_rows: int, vocab_size: int) -> np.ndarray:
    """`[rows, words]` int32, all bits set."""
    return np.full((num_rows, num_words(vocab_size)), -1, np.int32)


def write_only(token: int, words: np.ndarray) -> None:
    """Clears all bits of `words`, int32, but that of one token."""
    words.fill(0)
    words.view(np.uint32)[token // BITS] = 1 << token % BITS


def unpack(bits: Int32[Array, "B words"], vocab_size: int) -> Bool[Array, "B V"]:
    """Token `v` is bit `v % 32`, the lowest first, of word `v // 32`."""
    places = jnp.arange(BITS, dtype=jnp.int32)
    spread = (bits[:, :, None] >> places[None, None, :]) & 1
    return spread.reshape(len(bits), -1)[:, :vocab_size] != 0


def allow_only(
    logits: Float32[Array, "B V"], bits: Int32[Array, "B words"]
) -> Float32[Array, "B V"]:
    """Logits with those of all other tokens at -inf."""
    return jnp.where(unpack(bits, logits.shape[1]), logits, -jnp.inf)
