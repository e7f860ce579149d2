"""Tiny random Hugging Face checkpoints: a transformers config, its tensors, and their folder.

The tensor names and shapes are written out here on their own, so that they check the package's
checkpoint map instead of repeating it. Needs no PyTorch.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

FAMILIES = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "mistral": (MistralConfig, "MistralForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
}

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
"""Query heads and kv heads."""

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}

MAX_POSITIONS = {"default": 512, "linear": 128, "dynamic": 32, "llama3": 512, "yarn": 256}
"""`max_position_embeddings`: the original one where transformers wants that, to be exceeded."""


def tiny_config(
    family: str, *, heads: str = "gqa", rope: str = "default", **overrides: object
) -> PreTrainedConfig:
    """A two-layer model of `family`; `overrides` are attributes of its transformers config."""
    config_class, architecture = FAMILIES[family]
    num_heads, num_kv_heads = HEADS[heads]
    values: dict = dict(
        architectures=[architecture],
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS[rope],
        rope_parameters={"rope_theta": 10000.0, "rope_type": rope, **ROPES[rope]},
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    if family == "mistral":
        values["sliding_window"] = None
    return config_class(**values | overrides)


def random_tensors(config: PreTrainedConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors under their checkpoint names; large enough for every part to move logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(config):
        noise = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            tensors[name] = noise * np.float32(1.5 / np.sqrt(shape[1]))
        elif name.endswith("norm.weight"):
            tensors[name] = 1 + noise / 4
        else:
            tensors[name] = noise / 2
    return tensors


def save_checkpoint(
    path: Path,
    config: PreTrainedConfig,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """Write `config.json` and the safetensors of a random model; return the tensors as written."""
    path.mkdir(parents=True, exist_ok=True)
    config_json = config.to_dict() | {"dtype": dtype}
    (path / "config.json").write_text(json.dumps(config_json, indent=2))
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: t.astype(numpy_dtype) for name, t in random_tensors(config, seed).items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index["weight_map"] = weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return tensors


def _shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K = config.num_attention_heads, config.num_key_value_heads
    H = getattr(config, "head_dim", None) or D // N
    qwen2 = config.model_type == "qwen2"
    bias = getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    yield "model.embed_tokens.weight", (V, D)
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, rows in (("q", N), ("k", K), ("v", K)):
            yield f"{attention}.{name}_proj.weight", (rows * H, D)
            if qwen2 or bias:
                yield f"{attention}.{name}_proj.bias", (rows * H,)
        yield f"{attention}.o_proj.weight", (D, N * H)
        if bias and not qwen2:
            yield f"{attention}.o_proj.bias", (D,)
        if config.model_type == "qwen3":
            yield f"{attention}.q_norm.weight", (H,)
            yield f"{attention}.k_norm.weight", (H,)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            yield f"{mlp}.{name}_proj.weight", shape
            if mlp_bias:
                yield f"{mlp}.{name}_proj.bias", shape[:1]
        yield f"model.layers.{i}.input_layernorm.weight", (D,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (D,)
    yield "model.norm.weight", (D,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (V, D)
