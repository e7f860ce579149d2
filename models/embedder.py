"""What makes one embedding of a sequence's hidden states: pooling, linear layers, a classifier's
logits, normalisation. It does not know where its configuration comes from.

Source of the layout: Reimers and Gurevych 2019, arXiv:1908.10084.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.models.interface import Batch, Model, Piece, last_tokens
from jaxengine.models.layers import Parameters, project

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A linear layer with an activation."""

    folder: str  # of its weights, inside the checkpoint's
    in_features: int
    out_features: int
    has_bias: bool
    activation: str


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """What becomes of hidden states, in this order."""

    pooling: str  # a key of `POOLINGS`
    activation: str | None = None  # of a classifier's logits; None: there is no classifier
    dense: tuple[DenseConfig, ...] = ()
    normalizes: bool


class Dense(nnx.Module):
    """activation(weight x + bias), in float32."""

    def __init__(self, config: DenseConfig, new: Parameters):
        self.config = config
        self.weight = new.weight(embed=config.out_features, pooled=config.in_features)
        self.bias = new.bias(embed=config.out_features) if config.has_bias else None

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        x = project(x.astype(self.weight.dtype), self.weight)
        if self.bias is not None:
            x += self.bias[...].astype(x.dtype)[None]
        return ACTIVATIONS[self.config.activation](x)


class Embedder(nnx.Module):
    """What makes embeddings of a model's hidden states."""

    def __init__(self, config: EmbedderConfig, new: Parameters):
        self.config = config
        self.dense = nnx.List(Dense(each, new) for each in config.dense)

    def __call__(
        self, model: Model, hidden: Float[Array, "T D"], batch: Batch
    ) -> Float[Array, "B E"]:
        """Float32 embeddings, or scores of labels, of rows whose prompts end in this batch. Those
        of other rows mean nothing."""
        pooled = POOLINGS[self.config.pooling](hidden, batch)
        if self.config.activation is not None:
            pooled = ACTIVATIONS[self.config.activation](model.logits(pooled))
        x = pooled.astype(jnp.float32)
        for dense in self.dense:
            x = dense(x)
        return normalized(x) if self.config.normalizes else x


@runtime_checkable
class EmbeddingModel(Model, Protocol):
    """A model whose sequences are read and not continued."""

    embedder: Embedder


def embedder_pieces(config: EmbedderConfig) -> dict[str, tuple[Piece, ...]]:
    """Path of each parameter that an embedder adds to a model -> the tensor that fills it, whose
    name begins with the folder that it is in."""
    return {
        f"embedder.dense.{index}.{name}": (Piece(f"{dense.folder}.linear.{name}"),)
        for index, dense in enumerate(config.dense)
        for name in (("weight", "bias") if dense.has_bias else ("weight",))
    }


def normalized(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Each row divided by its length."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def first_token(hidden: Float[Array, "T D"], batch: Batch) -> Float[Array, "B D"]:
    assert batch.query_starts is not None, "a ragged batch"
    return hidden.at[batch.query_starts].get(mode="clip")


def last_token(hidden: Float[Array, "T D"], batch: Batch) -> Float[Array, "B D"]:
    return hidden[last_tokens(batch)]


def mean(hidden: Float[Array, "T D"], batch: Batch) -> Float[Array, "B D"]:
    """Of all tokens of each row, in float32. A product with the rows' indicators: its sums are in
    one order, whatever runs beside. A row that holds no number gets none, and no other does."""
    B = len(batch.query_lens)
    is_of_row = batch.rows[None] == jnp.arange(B, dtype=jnp.int32)[:, None]
    is_finite = jnp.isfinite(hidden).all(axis=1)
    sums = jnp.einsum(
        "bt,td->bd",
        is_of_row.astype(hidden.dtype),
        jnp.where(is_finite[:, None], hidden, 0),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    means = sums / jnp.maximum(batch.query_lens, 1)[:, None].astype(jnp.float32)
    has_others = (is_of_row & ~is_finite[None]).any(axis=1)
    return jnp.where(has_others[:, None], jnp.nan, means)


def largest(hidden: Float[Array, "T D"], batch: Batch) -> Float[Array, "B D"]:
    """The largest value that any token of the row has, in each dimension."""
    B = len(batch.query_lens)
    return jax.ops.segment_max(hidden, batch.rows, B + 1, indices_are_sorted=True)[:B]


POOLINGS: dict[str, Callable[[jax.Array, Batch], jax.Array]] = {
    "cls": first_token,
    "lasttoken": last_token,
    "max": largest,
    "mean": mean,
}
"""By the names that sentence-transformers has for them."""
