"""From a config.json to its configuration, and from that to its family, imported on demand. It
knows no family beyond its name."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx

    from jaxengine.models.bert import BertModel
    from jaxengine.models.config import ModelConfig
    from jaxengine.models.embedder import EmbedderConfig
    from jaxengine.models.encoder_config import EncoderConfig
    from jaxengine.models.interface import Piece
    from jaxengine.models.llama import LlamaForCausalLM

MODULES = {
    "BertModel": "bert",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "RobertaModel": "bert",
    "XLMRobertaModel": "bert",
}


def read_config(attributes: Mapping[str, Any]) -> "ModelConfig | EncoderConfig":
    """The configuration of the decoder or encoder that a config.json describes.

    Raises ValueError naming the attribute that is missing, malformed or not understood.
    """
    from jaxengine.models.config import ModelConfig
    from jaxengine.models.encoder_config import ENCODERS, EncoderConfig

    is_encoder = not ENCODERS.keys().isdisjoint(attributes.get("architectures") or ())
    return (EncoderConfig if is_encoder else ModelConfig).from_dict(attributes)


def build(
    config: "ModelConfig | EncoderConfig",
    *,
    dtype: str | None = None,
    rngs: "nnx.Rngs | None" = None,
    embedder: "EmbedderConfig | None" = None,
) -> "LlamaForCausalLM | BertModel":
    """A model with random parameters of `dtype`, the config's by default; with an embedder, if one
    is given, as its attribute of that name.

    Under `nnx.eval_shape(lambda: build(config))`, as an engine calls it, nothing is allocated.
    """
    import jax.numpy as jnp
    from flax import nnx

    from jaxengine.models.layers import Parameters

    new = Parameters(rngs or nnx.Rngs(0), jnp.dtype(dtype or config.dtype))
    model = model_class(config)(config, new)
    if embedder is not None:
        from jaxengine.models.embedder import Embedder

        model.embedder = Embedder(embedder, new)
    return model


def checkpoint_pieces(config: "ModelConfig | EncoderConfig") -> "dict[str, tuple[Piece, ...]]":
    """Path of each parameter, as in "layers.0.attention.qkv" -> the tensors that fill it."""
    return model_class(config).checkpoint_pieces(config)


def is_ignorable(name: str, config: "ModelConfig | EncoderConfig") -> bool:
    """Whether a checkpoint may hold a tensor of this name though no parameter wants it."""
    return model_class(config).is_ignorable(name, config)


def base_prefix(config: "ModelConfig | EncoderConfig") -> str:
    """What the names of all tensors but the head's begin with, in checkpoints of a model with a
    head. Those without have their names without it."""
    return model_class(config).base_prefix


def model_class(config: "ModelConfig | EncoderConfig") -> Any:
    """The class named by the config's architecture."""
    module = import_module(f"jaxengine.models.{MODULES[config.architecture]}")
    return getattr(module, config.architecture)
