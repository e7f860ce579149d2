"""From a `ModelConfig` to its family, imported on demand. It knows no family beyond its name."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax import nnx

    from jaxengine.models.config import ModelConfig
    from jaxengine.models.interface import Piece
    from jaxengine.models.llama import LlamaForCausalLM

MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def build(
    config: "ModelConfig", *, dtype: str | None = None, rngs: "nnx.Rngs | None" = None
) -> "LlamaForCausalLM":
    """A model with random parameters of `dtype`, the config's by default.

    Under `nnx.eval_shape(lambda: build(config))`, as an engine calls it, nothing is allocated.
    """
    import jax.numpy as jnp
    from flax import nnx

    from jaxengine.models.layers import Parameters

    new = Parameters(rngs or nnx.Rngs(0), jnp.dtype(dtype or config.dtype))
    return model_class(config)(config, new)


def checkpoint_pieces(config: "ModelConfig") -> "dict[str, tuple[Piece, ...]]":
    """Path of each parameter, as in "layers.0.attention.qkv" -> the tensors that fill it."""
    return model_class(config).checkpoint_pieces(config)


def is_ignorable(name: str, config: "ModelConfig") -> bool:
    """Whether a checkpoint may hold a tensor of this name though no parameter wants it."""
    return model_class(config).is_ignorable(name, config)


def model_class(config: "ModelConfig") -> "type[LlamaForCausalLM]":
    """The class named by the config's architecture."""
    module = import_module(f"jaxengine.models.{MODULES[config.architecture]}")
    return getattr(module, config.architecture)
