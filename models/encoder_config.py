"""What the config.json of a bidirectional encoder says: `ModelConfig` for BERT and its kin. It
knows no arrays and imports no jax; an attribute it does not understand is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxengine.models.attributes import Attributes
from jaxengine.models.config import (
    GENERATION,
    HEADS,
    IRRELEVANT,
    NEUTRAL,
    check_dtype,
    read_architecture,
    read_dtype,
    read_num_labels,
)

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

UNUSED = frozenset(
    "attention_probs_dropout_prob bos_token_id classifier_dropout directionality eos_token_id "
    "gradient_checkpointing hidden_dropout_prob layer_norm_type output_past pooler_fc_size "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "tie_word_embeddings".split()
)
"""Attributes of training, of other heads, or that transformers does not read either."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Everything about an encoder's checkpoint that changes the program or its shapes."""

    architecture: str
    head: str | None  # "labels": a classifier; None: hidden states are all there is
    num_labels: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float
    num_token_types: int
    position_offset: int  # row of the position table that the first token has
    max_position: int  # longest sequence
    dtype: str

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size = {self.hidden_size}, got "
                f"{self.num_heads}; correct the config"
            )
        check_dtype(self.dtype)

    num_cached_layers = 0  # each token's K and V depend on tokens behind it
    group_size = 1

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """The encoder that a config.json describes.

        Raises ValueError naming the attribute that is missing, malformed or not understood.
        """
        attributes = Attributes(config)
        architecture, head = read_architecture(attributes, ENCODERS)
        offset = _position_offset(attributes, architecture)
        attributes.expect("position_embedding_type", "absolute", None)
        found = cls(
            architecture=architecture,
            head=head,
            num_labels=read_num_labels(attributes) if head == "labels" else 0,
            vocab_size=attributes.count("vocab_size"),
            hidden_size=attributes.count("hidden_size"),
            intermediate_size=attributes.count("intermediate_size"),
            num_layers=attributes.count("num_hidden_layers"),
            num_heads=attributes.count("num_attention_heads"),
            hidden_act=_activation(attributes),
            layer_norm_eps=attributes.number("layer_norm_eps", 1e-12),
            num_token_types=attributes.count("type_vocab_size", 2),
            position_offset=offset,
            max_position=attributes.count("max_position_embeddings") - offset,
            dtype=read_dtype(attributes),
        )
        for name, values in NEUTRAL.items():
            attributes.expect(name, *values)
        attributes.finish(IRRELEVANT | GENERATION | UNUSED)
        return found


def _position_offset(attributes: Attributes, architecture: str) -> int:
    """RoBERTa counts positions from behind the one that its padding has."""
    padding = attributes.take("pad_token_id", None)
    if architecture == "BertModel":
        return 0
    return (1 if padding is None else padding) + 1


def _activation(attributes: Attributes) -> str:
    activation = attributes.take("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act: expected {' or '.join(ACTIVATIONS)}, got {activation!r}; use a "
            "checkpoint with one of them"
        )
    return activation


ENCODERS: dict[str, tuple[str, str | None]] = {
    family + suffix: (family + "Model", head)
    for family in ("Bert", "Roberta", "XLMRoberta")
    for suffix, head in HEADS.items()
    if head != "tokens"
}
"""Architecture -> the family it is of, as `EncoderConfig.architecture` names it, and its head."""
