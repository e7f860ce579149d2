"""Rotary position embedding in Hugging Face's half-split layout, with every supported stretching.
It knows positions and frequencies, not sequences, caches or checkpoints.

Source: Su et al. 2021, arXiv:2104.09864; dynamic and yarn: Peng et al. 2023, arXiv:2309.00071.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.models.interface import Batch
from jaxengine.models.rope_config import RopeConfig


class Rotation(NamedTuple):
    """Where each token's heads are turned to; one angle for each pair of dimensions."""

    cos: Float[Array, "T half_H"]
    sin: Float[Array, "T half_H"]


def rotation(batch: Batch, config: RopeConfig, head_size: int, dtype: jnp.dtype) -> Rotation:
    """cos and sin of position times frequency, computed in float32 and rounded to `dtype`."""
    positions = batch.positions.astype(jnp.float32)[:, None]
    if config.type == "dynamic":
        prompt_lens = batch.prompt_lens.at[batch.rows].get(mode="clip")
        lengths = jnp.maximum(prompt_lens, batch.positions + 1)
        angles = positions * dynamic_frequencies(lengths, config, head_size)
    else:
        angles = positions * jnp.asarray(frequencies(config, head_size))[None]
    factor = config.attention_factor
    return Rotation(
        (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)
    )


def rotate(x: Float[Array, "T heads H"], by: Rotation) -> Float[Array, "T heads H"]:
    """Every head of a token turned by the token's angles."""
    cos, sin = by.cos[:, None], by.sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def frequencies(config: RopeConfig, head_size: int) -> np.ndarray:
    """Radians per token of each of the `H/2` pairs, float32; computed in float64 on the host."""
    base = config.theta ** -(np.arange(0, head_size, 2) / head_size)
    match config.type:
        case "linear":
            base = base / config.factor
        case "llama3":
            base = _llama3(base, config)
        case "yarn":
            base = _yarn(base, config, head_size)
    return base.astype(np.float32)


def dynamic_frequencies(
    lengths: Int[Array, " T"], config: RopeConfig, head_size: int
) -> Float[Array, "T half_H"]:
    """Frequencies of a context of `lengths` tokens: the base grows with what exceeds the original.

    A token belongs to a context that reaches to the end of the prompt, or to itself if it was
    generated. So a cached key never has to turn again, and the outcome is that of transformers,
    which computes the prompt at once and then token after token.
    """
    original = config.original_max_position
    excess = jnp.maximum(lengths - original, 0).astype(jnp.float32) / original
    stretch = (1 + config.factor * excess) ** (head_size / (head_size - 2))
    exponents = jnp.asarray(np.arange(0, head_size, 2) / head_size, jnp.float32)
    return (config.theta * stretch[:, None]) ** -exponents[None]


def _llama3(base: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Slow pairs are stretched, fast ones kept, and those in between interpolated."""
    turns = config.original_max_position * base / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return base * (kept + (1 - kept) / config.factor)


def _yarn(base: np.ndarray, config: RopeConfig, head_size: int) -> np.ndarray:
    """Like llama3, but the interpolation is linear in the index of the pair."""
    low = _pair_of(config.beta_fast, config, head_size)
    high = _pair_of(config.beta_slow, config, head_size)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001
    stretched = np.clip((np.arange(head_size // 2) - low) / width, 0, 1)
    return base * (1 - stretched + stretched / config.factor)


def _pair_of(turns: float, config: RopeConfig, head_size: int) -> float:
    """Index of the pair that turns so many times within the original context."""
    wavelength = config.original_max_position / turns
    return head_size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))
