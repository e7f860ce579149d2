"""How a checkpoint stretches its rotary embedding, read from either generation of config.json.
It knows the numbers, not the frequencies: those are `rope.py`'s."""

import math
from dataclasses import dataclass

from jaxengine.models.attributes import Attributes

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: its base, and how contexts beyond the original change its frequencies."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0  # dynamic, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: ramp between whole dimensions

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"rope type: expected one of {', '.join(TYPES)}, got {self.type!r}")
        if self.type in ("dynamic", "llama3", "yarn") and self.original_max_position < 1:
            raise ValueError(
                f"original_max_position: expected a positive integer for rope type {self.type!r}, "
                f"got {self.original_max_position}"
            )


def read_rope(attributes: Attributes) -> tuple[RopeConfig, int]:
    """The rope of `rope_parameters`, or `rope_theta` and `rope_scaling`; the longest context."""
    max_position = attributes.count("max_position_embeddings")
    theta = attributes.number("rope_theta", 10000.0)
    scaling = attributes.take("rope_scaling", None)
    scaling = attributes.take("rope_parameters", None) or scaling or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_parameters: expected an object, got {scaling!r}")
    rope = Attributes(scaling, "config.json's rope_parameters")
    older = rope.take("type", "default")
    kind = rope.take("rope_type", older)
    rope.expect("partial_rotary_factor", 1, None)
    theta = rope.number("rope_theta", theta)
    numbers = _READERS[kind](rope, max_position) if kind in _READERS else {}
    config = RopeConfig(theta=theta, type=kind, **numbers)
    rope.finish()
    return config, _context(config, max_position)


def _context(rope: RopeConfig, max_position: int) -> int:
    """`max_position_embeddings` is the original length for some types, the stretched for others."""
    if rope.type in ("linear", "dynamic"):
        return int(max_position * rope.factor)
    if rope.type == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position


def _linear(rope: Attributes, max_position: int) -> dict:
    return dict(factor=rope.number("factor"))


def _dynamic(rope: Attributes, max_position: int) -> dict:
    return dict(factor=rope.number("factor"), original_max_position=max_position)


def _llama3(rope: Attributes, max_position: int) -> dict:
    return dict(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.count("original_max_position_embeddings", max_position),
    )


def _yarn(rope: Attributes, max_position: int) -> dict:
    original = rope.count("original_max_position_embeddings", max_position)
    factor = rope.number("factor", max_position / original)
    mscale = rope.optional_number("mscale")
    mscale_all_dim = rope.optional_number("mscale_all_dim")
    attention_factor = _mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return dict(
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _mscale(factor: float, mscale: float) -> float:
    """Attention temperature for a longer context. Source: Peng et al. 2023, arXiv:2309.00071."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
