import pytest
import tiny

from jaxengine.models import MODULES
from jaxengine.models.config import FAMILIES, ModelConfig
from jaxengine.models.encoder_config import ENCODERS
from jaxengine.models.rope_config import RopeConfig
from jaxengine.models.shapes import SHAPES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}


def test_every_architecture_has_a_module_and_a_reader():
    decoders, encoders = set(FAMILIES), {family for family, _ in ENCODERS.values()}
    assert set(MODULES) == decoders | encoders


@pytest.mark.parametrize(
    "architecture, head, num_labels",
    [("Qwen3Model", None, 0), ("Qwen3ForSequenceClassification", "labels", 2)],
)
def test_a_family_is_known_by_whatever_head_it_has(architecture, head, num_labels):
    config = ModelConfig.from_dict(QWEN3 | {"architectures": [architecture]})
    assert (config.architecture, config.head) == ("Qwen3ForCausalLM", head)
    assert config.num_labels == num_labels and not config.has_lm_head


def test_a_minimal_config_gets_the_defaults_of_transformers():
    config = ModelConfig.from_dict(LLAMA)
    assert (config.num_kv_heads, config.head_size, config.group_size) == (4, 16, 1)
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.sliding_window == (None, None, None)
    assert (config.eos_ids, config.bos_id, config.dtype) == ((), None, "float32")
    assert not (config.tie_embeddings or config.attention_bias or config.mlp_bias)


def test_a_config_can_key_a_cache():
    assert hash(ModelConfig.from_dict(LLAMA)) == hash(ModelConfig.from_dict(dict(LLAMA)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("rope", tiny.ROPES)
def test_what_transformers_writes_is_understood(family, rope):
    hf = tiny.tiny_config(family, rope=rope)
    config = ModelConfig.from_dict(hf.to_dict() | {"dtype": "bfloat16"})
    assert config.rope.type == rope
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (4, 2, 16)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_both_generations_of_the_format_say_the_same(rope):
    scaling = tiny.ROPES[rope]
    new = LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": rope, **scaling}}
    new |= {"dtype": "bfloat16"}
    old = LLAMA | {"rope_theta": 500000, "torch_dtype": "bfloat16", "rope_scaling": None}
    older = dict(old)
    if scaling:
        old["rope_scaling"] = {"rope_type": rope, **scaling}
        older["rope_scaling"] = {"type": rope, **scaling}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old) == ModelConfig.from_dict(older)


@pytest.mark.parametrize(
    "scaling, context",
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 320),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", **tiny.ROPES["llama3"]}, 128),
    ],
)
def test_the_context_includes_what_the_scaling_adds(scaling, context):
    assert ModelConfig.from_dict(LLAMA | {"rope_scaling": scaling}).max_position == context


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_are_understood(name):
    config = ModelConfig.from_dict(SHAPES[name])
    assert config.dtype == "bfloat16"
    assert not any(config.sliding_window)


def test_published_sizes_are_right():
    config = ModelConfig.from_dict(SHAPES["qwen3-0.6b"])
    assert (config.head_size, config.num_heads, config.hidden_size) == (128, 16, 1024)
    config = ModelConfig.from_dict(SHAPES["qwen2.5-0.5b"])
    assert (config.head_size, config.attention_bias, config.output_bias) == (64, True, False)
    config = ModelConfig.from_dict(SHAPES["llama-3.2-1b"])
    assert (config.rope.factor, config.tie_embeddings, config.max_position) == (32.0, True, 131072)


def test_several_end_tokens_are_kept():
    config = ModelConfig.from_dict(LLAMA | {"eos_token_id": [5, 0, 7], "bos_token_id": 3})
    assert (config.eos_ids, config.bos_id) == ((5, 0, 7), 3)


def test_biases_are_where_each_family_has_them():
    bias = {"attention_bias": True}
    llama = ModelConfig.from_dict(LLAMA | bias | {"mlp_bias": True})
    assert (llama.attention_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2, qwen3 = ModelConfig.from_dict(QWEN2 | bias), ModelConfig.from_dict(QWEN3 | bias)
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)
    assert (qwen3.attention_bias, qwen3.output_bias) == (True, True)


def test_mistral_slides_in_all_layers_or_none():
    assert ModelConfig.from_dict(MISTRAL | {"sliding_window": 8}).sliding_window == (8, 8, 8)
    assert ModelConfig.from_dict(MISTRAL).sliding_window == (4096,) * 3
    full = ModelConfig.from_dict(MISTRAL | {"sliding_window": None})
    assert full.sliding_window == (None, None, None)


def test_qwen_slides_where_it_says():
    window = {"use_sliding_window": True, "sliding_window": 8}
    older = ModelConfig.from_dict(QWEN2 | window | {"max_window_layers": 2})
    assert older.sliding_window == (None, None, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    newer = ModelConfig.from_dict(QWEN3 | window | {"layer_types": types})
    assert newer.sliding_window == (8, None, 8)
    off = ModelConfig.from_dict(QWEN2 | {"use_sliding_window": False, "sliding_window": 8})
    assert off.sliding_window == (None, None, None)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures.*LlamaForCausalLM.*Mamba"),
        ({"architectures": None}, "architectures.*got none"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer, got '64'"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "num_attention_heads.*multiple.*3"),
        ({"head_dim": 15}, "head_dim.*even.*15"),
        ({"sliding_window": 4}, "sliding_window = 4"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"torch_dtype": "float64"}, "dtype.*float64"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type.*yarn.*longrope"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "factor = 2.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": [1]}, "rope_parameters.*object"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(LLAMA | change)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_missing_size_is_named(name):
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        ModelConfig.from_dict({key: value for key, value in LLAMA.items() if key != name})


@pytest.mark.parametrize(
    "config",
    [
        QWEN2 | {"layer_types": ["sliding_attention"] * 3},
        QWEN2 | {"layer_types": ["full_attention"] * 2},
        QWEN3 | {"layer_types": ["chunked_attention"] * 3},
        MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
    ],
)
def test_layer_types_that_contradict_the_config_are_refused(config):
    with pytest.raises(ValueError, match="layer_types"):
        ModelConfig.from_dict(config)


def test_what_cannot_matter_is_accepted():
    ModelConfig.from_dict(
        LLAMA
        | {"use_cache": False, "temperature": 0.6, "pretraining_tp": 1, "sliding_window": None}
    )
