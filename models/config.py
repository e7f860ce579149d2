"""What a checkpoint's config.json says, in one form for every family and both generations of the
format. It knows no arrays and imports no jax; an attribute it does not understand is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxengine.models.attributes import Attributes
from jaxengine.models.rope_config import RopeConfig, read_rope

DTYPES = ("float32", "bfloat16", "float16")

IRRELEVANT = frozenset(
    "_attn_implementation_autoset _commit_hash _name_or_path attention_dropout attn_implementation "
    "chunk_size_feed_forward finetuning_task id2label initializer_range is_decoder is_matryoshka "
    "label2id matryoshka_dimensions max_window_layers model_type name_or_path num_labels "
    "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "sbert_ce_default_activation_function sentence_transformers sep_token_id task_specific_params "
    "tokenizer_class torchscript transformers_version unsloth_fixed unsloth_version use_bfloat16 "
    "use_cache".split()
)
"""Attributes that cannot change the logits of an inference. What becomes of them to make embeddings
is told elsewhere."""

GENERATION = frozenset(
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix "
    "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature "
    "top_k top_p typical_p".split()
)
"""Sampling defaults that older transformers wrote here; generation_config.json is their place."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tf_legacy_loss": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False, None),
}
"""Values at which an attribute that a family does not handle changes nothing."""

HEADS = {"ForCausalLM": "tokens", "ForSequenceClassification": "labels", "Model": None}
"""How the name of an architecture ends -> what its logits are of, if it has any."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a checkpoint that changes the program or its shapes."""

    architecture: str
    head: str | None = "tokens"  # "labels": of a classifier; None: it gives hidden states alone
    num_labels: int = 0
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    sliding_window: tuple[int | None, ...]  # per layer; None attends to everything before
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_position: int  # longest context, rope scaling included
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.architecture not in FAMILIES:
            raise ValueError(_unsupported([self.architecture]))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_attention_heads: expected a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}, got {self.num_heads}; correct the config"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_size}")
        if len(self.sliding_window) != self.num_layers:
            raise ValueError(
                f"layer_types: expected {self.num_layers}, one a layer, "
                f"got {len(self.sliding_window)}; correct the config"
            )
        check_dtype(self.dtype)

    @property
    def num_cached_layers(self) -> int:
        """Layers whose K and V are kept."""
        return self.num_layers

    @property
    def has_lm_head(self) -> bool:
        """Whether the next token's logits have a matrix of their own."""
        return self.head == "tokens" and not self.tie_embeddings

    @property
    def group_size(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """The model that a config.json describes, in transformers' present or older form.

        Raises ValueError naming the attribute that is missing, malformed or not understood.
        """
        attributes = Attributes(config)
        architecture, head = read_architecture(attributes, ARCHITECTURES)
        num_labels = read_num_labels(attributes) if head == "labels" else 0
        common = _common(attributes)
        own = FAMILIES[architecture](attributes, common["num_layers"])
        for name, values in NEUTRAL.items():
            attributes.expect(name, *values)
        attributes.finish(IRRELEVANT | GENERATION)
        return cls(architecture=architecture, head=head, num_labels=num_labels, **common, **own)


def read_architecture(
    attributes: Attributes, known: Mapping[str, tuple[str, str | None]]
) -> tuple[str, str | None]:
    """What `known` says of the first of the architectures named that is in it."""
    named = attributes.take("architectures", None) or []
    supported = [known[architecture] for architecture in named if architecture in known]
    if not supported:
        raise ValueError(_unsupported(named))
    return supported[0]


def _unsupported(architectures: list[str]) -> str:
    return (
        f"architectures: expected one of {', '.join(FAMILIES)}, got "
        f"{', '.join(architectures) or 'none'}; use a checkpoint of a supported family"
    )


def read_num_labels(attributes: Attributes) -> int:
    """Of a classifier; two where nothing is said, as in transformers."""
    return attributes.count("num_labels", len(attributes.take("id2label", None) or ()) or 2)


def read_dtype(attributes: Attributes) -> str:
    """By its present or its older name."""
    older = attributes.take("torch_dtype", None)
    return str(attributes.take("dtype", None) or older or "float32")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}; ask for one of them"
        )


def _common(attributes: Attributes) -> dict[str, Any]:
    """The fields that every family reads alike."""
    hidden_size = attributes.count("hidden_size")
    num_heads = attributes.count("num_attention_heads")
    rope, max_position = read_rope(attributes)
    attributes.expect("hidden_act", "silu")
    return dict(
        vocab_size=attributes.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=attributes.count("intermediate_size"),
        num_layers=attributes.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=attributes.count("num_key_value_heads", num_heads),
        head_size=attributes.count("head_dim", hidden_size // num_heads),
        rms_norm_eps=attributes.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=attributes.flag("tie_word_embeddings"),
        max_position=max_position,
        eos_ids=attributes.token_ids("eos_token_id"),
        bos_id=next(iter(attributes.token_ids("bos_token_id")), None),
        dtype=read_dtype(attributes),
    )


def _llama(attributes: Attributes, num_layers: int) -> dict[str, Any]:
    bias = attributes.flag("attention_bias")
    return dict(
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=attributes.flag("mlp_bias"),
        sliding_window=_uniform(attributes, None, num_layers),
    )


def _mistral(attributes: Attributes, num_layers: int) -> dict[str, Any]:
    window = attributes.optional_count("sliding_window", 4096)
    return dict(sliding_window=_uniform(attributes, window, num_layers))


def _qwen2(attributes: Attributes, num_layers: int) -> dict[str, Any]:
    attributes.expect("attention_bias", True)
    return dict(attention_bias=True, sliding_window=_mixed(attributes, num_layers))


def _qwen3(attributes: Attributes, num_layers: int) -> dict[str, Any]:
    bias = attributes.flag("attention_bias")
    windows = _mixed(attributes, num_layers)
    return dict(attention_bias=bias, output_bias=bias, sliding_window=windows)


def _uniform(attributes: Attributes, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """The same window in every layer; `layer_types`, which these families ignore, must agree."""
    kind = "sliding_attention" if window else "full_attention"
    attributes.expect("layer_types", [kind] * num_layers, None)
    return (window,) * num_layers


def _mixed(attributes: Attributes, num_layers: int) -> tuple[int | None, ...]:
    """Windows where `layer_types` says so or, in older files, from layer `max_window_layers` on."""
    first = attributes.take("max_window_layers", 28)
    window = attributes.optional_count("sliding_window", 4096)
    if not attributes.flag("use_sliding_window"):
        window = None
    kinds = attributes.take("layer_types", None) or [
        "sliding_attention" if window and layer >= first else "full_attention"
        for layer in range(num_layers)
    ]
    for kind in kinds:
        if kind != "full_attention" and not (window and kind == "sliding_attention"):
            raise ValueError(
                "layer_types: expected full_attention, or sliding_attention with use_sliding_window"
                f" and a sliding_window, got {kind!r}; correct the config"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILIES = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
"""Architecture -> what its config.json says beyond the common part."""

ARCHITECTURES = {
    family.removesuffix("ForCausalLM") + suffix: (family, head)
    for family in FAMILIES
    for suffix, head in HEADS.items()
}
"""Architecture -> the family it is of, as `ModelConfig.architecture` names it, and its head."""
