"""BERT and RoBERTa: encoders whose tokens see all of their sequence, for embeddings and labels.
They know no cache: a batch holds whole sequences.

A token of the second text of a pair is its id plus the size of the vocabulary: so the segment
travels with the token.

Source: Devlin et al. 2018, arXiv:1810.04805; RoBERTa: Liu et al. 2019, arXiv:1907.11692.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxengine.models.bidirectional_attention import attend_both_ways
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.models.interface import Batch, KVCache, Piece
from jaxengine.models.layers import Parameters, layer_norm, linear, project
from jaxengine.models.taps import INSIDE, Taps
from jaxengine.pallas_kernels.dispatch import XLA, Kernels

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Layer(nnx.Module):
    """Attention and MLP, each added to what it was given; the sums are normalised."""

    def __init__(self, config: EncoderConfig, new: Parameters):
        D, F, N, H = (
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.head_size,
        )
        self.eps, self.activation = config.layer_norm_eps, config.hidden_act
        self.qkv = new.weight(qkv=3, heads=N, head=H, embed=D)
        self.qkv_bias = new.bias(qkv=3, heads=N, head=H)
        self.out = new.weight(embed=D, heads=N, head=H)
        self.out_bias = new.bias(embed=D)
        self.attention_norm = new.scale(embed=D)
        self.attention_norm_bias = new.bias(embed=D)
        self.up = new.weight(mlp=F, embed=D)
        self.up_bias = new.bias(mlp=F)
        self.down = new.weight(embed=D, mlp=F)
        self.down_bias = new.bias(embed=D)
        self.mlp_norm = new.scale(embed=D)
        self.mlp_norm_bias = new.bias(embed=D)

    def __call__(self, x: Float[Array, "T D"], batch: Batch) -> Float[Array, "T D"]:
        T, (_, N, H, _) = len(x), self.qkv.shape
        qkv = linear(x, self.qkv, bias=self.qkv_bias).reshape(T, 3, N, H)
        mixed = attend_both_ways(qkv, batch, scale=H**-0.5).reshape(T, -1)
        x = linear(mixed, self.out, bias=self.out_bias, residual=x)
        x = layer_norm(x, self.attention_norm[...], self.attention_norm_bias[...], eps=self.eps)
        hidden = ACTIVATIONS[self.activation](linear(x, self.up, bias=self.up_bias))
        x = linear(hidden, self.down, bias=self.down_bias, residual=x)
        return layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], eps=self.eps)


class BertModel(nnx.Module):
    """The encoder, with the classifier that its config has. Implements `interface.Model`."""

    base_prefix = "bert."
    classifier_names = ("bert.pooler.dense", "classifier")
    head = None

    def __init__(self, config: EncoderConfig, new: Parameters):
        D = config.hidden_size
        self.config = config
        self.word_embeddings = new.weight(vocab=config.vocab_size, embed=D)
        num_positions = config.max_position + config.position_offset
        self.position_embeddings = new.weight(positions=num_positions, embed=D)
        self.token_type_embeddings = new.weight(types=config.num_token_types, embed=D)
        self.embeddings_norm = new.scale(embed=D)
        self.embeddings_norm_bias = new.bias(embed=D)
        self.layers = nnx.List(Layer(config, new) for _ in range(config.num_layers))
        has_labels = config.head == "labels"
        self.pooler = new.weight(pooled=D, embed=D) if has_labels else None
        self.pooler_bias = new.bias(pooled=D) if has_labels else None
        self.classifier = new.weight(labels=config.num_labels, pooled=D) if has_labels else None
        self.classifier_bias = new.bias(labels=config.num_labels) if has_labels else None

    def __call__(
        self,
        batch: Batch,
        cache: KVCache | None,
        kernels: Kernels = XLA,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "T D"], KVCache | None]:
        taps = taps or Taps()
        x = taps("embedding", None, self._embedded(batch.tokens, batch.positions))
        for index, layer in enumerate(self.layers):
            if taps.look_inside(index):
                raise ValueError(f"an encoder shows none of {', '.join(INSIDE)}; take block_input")
            x = _run(*nnx.split(layer), taps("block_input", index, x), batch)
        return taps("final_norm", None, x), cache

    def _embedded(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> Float[Array, "T D"]:
        """The sum of what each token, its place and its segment stand for, normalised; no numbers
        where there is no such token."""
        types, words = jnp.divmod(tokens, self.config.vocab_size)
        read = dict(mode="fill", wrap_negative_indices=False)
        x = self.word_embeddings[...].at[words].get(**read)
        x += self.token_type_embeddings[...].at[types].get(**read)
        x += self.position_embeddings[...].at[positions + self.config.position_offset].get(**read)
        scale, bias = self.embeddings_norm[...], self.embeddings_norm_bias[...]
        return layer_norm(x, scale, bias, eps=self.config.layer_norm_eps)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B labels"]:
        """Of the labels, from the hidden state of each sequence's first token."""
        if self.pooler is None or self.classifier is None or self.classifier_bias is None:
            raise ValueError("logits: this encoder is no classifier and has none")
        pooled = jnp.tanh(linear(hidden, self.pooler, bias=self.pooler_bias))
        return (
            project(pooled, self.classifier) + self.classifier_bias[...].astype(jnp.float32)[None]
        )

    @classmethod
    def checkpoint_pieces(cls, config: EncoderConfig) -> dict[str, tuple[Piece, ...]]:
        """Path of each parameter -> the checkpoint tensors that fill it."""
        embeddings = f"{cls.base_prefix}embeddings"
        pieces: dict[str, tuple[Piece, ...]] = {
            f"{name}_embeddings": (Piece(f"{embeddings}.{name}_embeddings.weight"),)
            for name in ("word", "position", "token_type")
        }
        pieces["embeddings_norm"] = (Piece(f"{embeddings}.LayerNorm.weight"),)
        pieces["embeddings_norm_bias"] = (Piece(f"{embeddings}.LayerNorm.bias"),)
        for layer in range(config.num_layers):
            prefix = f"{cls.base_prefix}encoder.layer.{layer}"
            for path, parts in _layer_pieces(prefix).items():
                pieces[f"layers.{layer}.{path}"] = parts
        if config.head == "labels":
            for path, name in zip(("pooler", "classifier"), cls.classifier_names, strict=True):
                pieces |= _pieces(path, name)
        return pieces

    @staticmethod
    def is_ignorable(name: str, config: EncoderConfig) -> bool:
        """Whether a checkpoint tensor may be there without filling anything: tables of 0, 1, 2,
        and so on, and heads that are not used."""
        is_table = name.endswith(("embeddings.position_ids", "embeddings.token_type_ids"))
        return is_table or (config.head is None and "pooler.dense." in name)


class RobertaModel(BertModel):
    """BERT whose positions begin behind that of padding, and whose classifier has no pooler."""

    base_prefix = "roberta."
    classifier_names = ("classifier.dense", "classifier.out_proj")


class XLMRobertaModel(RobertaModel):
    """RoBERTa in many languages: another vocabulary.

    Source: Conneau et al. 2019, arXiv:1911.02116.
    """


def _layer_pieces(prefix: str) -> dict[str, tuple[Piece, ...]]:
    """Of one layer, whose tensors' names begin with `prefix`."""
    attention = f"{prefix}.attention"
    qkv = [
        (f"{attention}.self.{name}", np.s_[i]) for i, name in enumerate(("query", "key", "value"))
    ]
    return {
        "qkv": tuple(Piece(f"{name}.weight", index) for name, index in qkv),
        "qkv_bias": tuple(Piece(f"{name}.bias", index) for name, index in qkv),
        **_pieces("out", f"{attention}.output.dense"),
        **_pieces("attention_norm", f"{attention}.output.LayerNorm"),
        **_pieces("up", f"{prefix}.intermediate.dense"),
        **_pieces("down", f"{prefix}.output.dense"),
        **_pieces("mlp_norm", f"{prefix}.output.LayerNorm"),
    }


def _pieces(path: str, name: str) -> dict[str, tuple[Piece, ...]]:
    """Of a weight or scale with its bias."""
    return {path: (Piece(f"{name}.weight"),), f"{path}_bias": (Piece(f"{name}.bias"),)}


@partial(jax.jit, static_argnums=0)
def _run(
    structure: nnx.GraphDef, parameters: PyTree[Array], x: Float[Array, "T D"], batch: Batch
) -> Float[Array, "T D"]:
    """One layer. Layers of equal structure are traced and lowered once, however many there are."""
    return nnx.merge(structure, parameters)(x, batch)
