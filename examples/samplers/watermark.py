"""A watermark in the choice of words: found by counting, without the model.

The token before the next one splits the vocabulary, by a hash, into a green list with a share
`gamma` of it and a red one; `delta` is added to green logits. Of T tokens of plain text about
gamma T are green. If s are, then

    z = (s - gamma T) / sqrt(T gamma (1 - gamma))

is about standard normal for text without the mark, and grows with sqrt(T) for text with it. Each
pair of adjacent tokens counts once, since repetitions are no evidence.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", arXiv:2301.10226, section
3.1 and 3.2. There the list is a permuted vocabulary; here each id is hashed on its own, so that it
costs one pass over the logits, and the detector hashes one id a token. The mixing function is
Appleby's, of MurmurHash3: who does not know the key sees no pattern, but it is no cryptography.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.sampling.extensions import LogitsProcessor, Row

GAMMA, DELTA, KEY = 0.25, 2.0, 15485863


def watermark(
    logits: Float[Array, " V"], params: Mapping[str, Array], row: Row
) -> Float[Array, " V"]:
    """Logits with `delta` more for green tokens."""
    previous, ids = row.tokens[row.length - 1], jnp.arange(len(logits))
    green = is_green(previous, ids, params["key"], params["gamma"])
    return jnp.where(green, logits + params["delta"], logits)


class Detection(NamedTuple):
    num_pairs: int  # T
    num_green: int
    z: float
    p_value: float  # of so many green tokens or more, without a watermark


def detect(tokens: Sequence[int], *, key: int = KEY, gamma: float = GAMMA) -> Detection:
    """What the adjacent pairs of `tokens` tell. ValueError if there is none."""
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(tokens)}")
    pairs = np.unique(np.stack([tokens[:-1], tokens[1:]], axis=1), axis=0)
    num_green = int(is_green(pairs[:, 0], pairs[:, 1], np.uint32(key), gamma).sum())
    T = len(pairs)
    z = (num_green - gamma * T) / math.sqrt(T * gamma * (1 - gamma))
    return Detection(T, num_green, z, math.erfc(z / math.sqrt(2)) / 2)


def is_green(
    previous: Int[Any, "*n"],
    ids: Int[Any, "*n"],
    key: UInt32[Any, ""],
    gamma: Float[Any, ""],
) -> Bool[Array, "*n"]:
    """Whether `ids` are on the green list of the token before them."""
    seed = mixed(mixed(jnp.uint32(key)) ^ jnp.asarray(previous).astype(jnp.uint32))
    bits = mixed(seed ^ (jnp.asarray(ids).astype(jnp.uint32) * np.uint32(0x9E3779B1)))
    return (bits >> 8).astype(jnp.float32) < jnp.float32(gamma) * 2**24


def mixed(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """A bijection of 32-bit words in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


PROCESSOR = LogitsProcessor(
    function=watermark, params={"gamma": GAMMA, "delta": DELTA, "key": np.uint32(KEY)}
)
