import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import dense_batch
from jaxengine.models.rope import Rotation, dynamic_frequencies, frequencies, rotate, rotation
from jaxengine.models.rope_config import RopeConfig

YARN = RopeConfig(type="yarn", factor=4.0, original_max_position=64)


def hf_frequencies(hf, length=None):
    pytest.importorskip("torch", reason="transformers computes its frequencies in PyTorch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(hf)[0].numpy(), 1.0
    values, factor = ROPE_INIT_FUNCTIONS[kind](hf, seq_len=length)
    return values.numpy(), factor


@pytest.mark.oracle
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rope", [rope for rope in tiny.ROPES if rope != "dynamic"])
def test_frequencies_are_those_of_transformers(rope, head_size):
    hf = tiny.tiny_config("llama", rope=rope, head_dim=head_size)
    expected, factor = hf_frequencies(hf)
    config = ModelConfig.from_dict(hf.to_dict() | {"dtype": "float32"}).rope
    np.testing.assert_allclose(frequencies(config, head_size), expected, rtol=1e-6)
    assert config.attention_factor == factor


@pytest.mark.oracle
@pytest.mark.parametrize(
    "extra",
    [
        {"beta_fast": 16, "beta_slow": 2},
        {"truncate": False},
        {"attention_factor": 0.7},
        {"mscale": 0.9, "mscale_all_dim": 0.6},
        {"mscale": 0.9},
        {"factor": 1.0},
        {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        {"original_max_position_embeddings": 4},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_yarn_options_mean_what_transformers_means(extra):
    parameters = {"rope_theta": 1e6, "rope_type": "yarn", **tiny.ROPES["yarn"], **extra}
    hf = tiny.tiny_config("qwen3", rope="yarn", head_dim=128, rope_parameters=parameters)
    expected, factor = hf_frequencies(hf)
    config = ModelConfig.from_dict(hf.to_dict() | {"dtype": "float32"}).rope
    np.testing.assert_allclose(frequencies(config, 128), expected, rtol=1e-6)
    assert config.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("head_size", [64, 80])
def test_dynamic_frequencies_are_those_of_transformers(head_size):
    hf = tiny.tiny_config("llama", rope="dynamic", head_dim=head_size)
    config = ModelConfig.from_dict(hf.to_dict() | {"dtype": "float32"}).rope
    lengths = [1, 31, 32, 33, 127, 1009]
    got = dynamic_frequencies(jnp.asarray(lengths, jnp.int32), config, head_size)
    expected = [hf_frequencies(hf, length)[0] for length in lengths]
    np.testing.assert_allclose(got, np.stack(expected), rtol=2e-6)


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones():
    config = RopeConfig(type="llama3", theta=5e5, factor=8.0, original_max_position=8192)
    ratio = frequencies(config, 128) / frequencies(RopeConfig(theta=5e5), 128)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 1e-7).all()


def test_cos_and_sin_hold_at_far_positions():
    positions = np.array([0, 1, 17, 4095, 131071], np.int32)
    batch = dense_batch(jnp.zeros(5, jnp.int32))._replace(positions=jnp.asarray(positions))
    config = RopeConfig(theta=5e5)
    got = rotation(batch, config, 64, jnp.dtype("float32"))
    angles = positions[:, None].astype(np.float32) * frequencies(config, 64)
    np.testing.assert_allclose(got.cos, np.cos(angles.astype(np.float64)), atol=5e-7)
    np.testing.assert_allclose(got.sin, np.sin(angles.astype(np.float64)), atol=5e-7)


def test_yarn_scales_cos_and_sin_by_its_attention_factor():
    batch = dense_batch(jnp.zeros(3, jnp.int32))
    plain = rotation(batch, YARN, 16, jnp.dtype("float32"))
    scaled = RopeConfig(type="yarn", factor=4.0, original_max_position=64, attention_factor=2.0)
    by = rotation(batch, scaled, 16, jnp.dtype("float32"))
    np.testing.assert_allclose(by.cos, 2 * plain.cos, rtol=1e-6)


def test_a_dynamic_token_belongs_to_its_prompt_or_to_itself():
    config = RopeConfig(type="dynamic", factor=4.0, original_max_position=8)
    batch = dense_batch(jnp.zeros(16, jnp.int32))
    batch = batch._replace(prompt_lens=jnp.asarray([12], jnp.int32))
    got = rotation(batch, config, 16, jnp.dtype("float32")).sin
    lengths = np.maximum(12, np.arange(16) + 1)
    expected = np.sin(np.arange(16)[:, None] * _dynamic_oracle(config, lengths, 16))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_rotation_turns_pairs_of_the_two_halves():
    quarter = Rotation(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    x = jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]])
    np.testing.assert_array_equal(rotate(x, quarter), [[[-3.0, -4.0, 1.0, 2.0]]])


def test_rotation_keeps_lengths_and_depends_on_distance_alone(rng):
    batch = dense_batch(jnp.zeros(9, jnp.int32))
    by = rotation(batch, RopeConfig(), 80, jnp.dtype("float32"))
    q, k = rng.standard_normal((2, 1, 1, 80)).astype(np.float32)
    turned_q = np.asarray(rotate(jnp.tile(q, (9, 1, 1)), by))[:, 0]
    turned_k = np.asarray(rotate(jnp.tile(k, (9, 1, 1)), by))[:, 0]
    np.testing.assert_allclose(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q), rtol=1e-5)
    scores = turned_q @ turned_k.T
    for distance in range(9):
        np.testing.assert_allclose(np.diag(scores, distance), scores[0, distance], atol=1e-4)


def _dynamic_oracle(config, lengths, head_size):
    stretch = config.factor * lengths / config.original_max_position - (config.factor - 1)
    base = config.theta * np.maximum(stretch, 1) ** (head_size / (head_size - 2))
    return base[:, None] ** -(np.arange(0, head_size, 2) / head_size)


def test_the_oracle_of_dynamic_is_plain_below_the_original_length():
    config = RopeConfig(type="dynamic", factor=4.0, original_max_position=8)
    plain = frequencies(RopeConfig(), 16)
    np.testing.assert_allclose(_dynamic_oracle(config, np.array([8]), 16)[0], plain, rtol=1e-6)
    assert math.isclose(plain[0], 1.0)
