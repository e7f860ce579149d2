"""Pooling of ragged rows against NumPy, heads of decoders against transformers, and a whole
sentence-transformers model."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import test_pooling
import tiny
from flax import nnx
from test_bert import ours, tiny_encoder, whole
from test_models import random_prompts

from jaxengine import models
from jaxengine.models.embedder import POOLINGS, DenseConfig, Embedder, EmbedderConfig
from jaxengine.models.layers import Parameters

LENGTHS = (1, 17, 5)


def embedder(**config: Any) -> Embedder:
    new = Parameters(nnx.Rngs(0), jnp.dtype(jnp.float32))
    return Embedder(EmbedderConfig(**config), new)


BY_HAND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(axis=0),
    "mean": lambda states: states.astype(np.float64).mean(axis=0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_row_is_pooled_by_itself(pooling, dtype, rng):
    lengths = (3, 0, 1, 5)
    batch = whole([np.zeros(length, int) for length in lengths], num_tokens=12)
    hidden = jnp.asarray(rng.standard_normal((12, 8)), dtype)
    pooled = POOLINGS[pooling](hidden, batch)
    rows = np.split(np.asarray(hidden, np.float32), np.cumsum(lengths))
    for row, states in enumerate(rows[:-1]):
        if len(states):
            np.testing.assert_allclose(pooled[row], BY_HAND[pooling](states), atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_that_is_no_number_spoils_no_other(pooling):
    batch = whole([np.zeros(2, int), np.zeros(2, int)])
    hidden = jnp.ones((4, 8)).at[:2].set(jnp.nan)
    pooled = POOLINGS[pooling](hidden, batch)
    assert np.isnan(pooled[0]).all() and (pooled[1] == 1).all()


def test_dense_layers_and_normalisation_follow_pooling(rng):
    dense = DenseConfig(
        folder="2_Dense", in_features=64, out_features=3, has_bias=True, activation="tanh"
    )
    model = models.build(models.read_config(test_pooling.ENCODER))
    found = embedder(pooling="cls", dense=(dense,), normalizes=True)
    weight, bias = rng.standard_normal((3, 64)), rng.standard_normal(3)
    nnx.update(found.dense[0], {"weight": weight.astype("f4"), "bias": bias.astype("f4")})
    x = rng.standard_normal((2, 64))
    got = found(model, jnp.asarray(x, jnp.float32), whole([[0], [0]]))
    expected = np.tanh(x @ weight.T + bias)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_labels_of_a_decoder_are_scored_at_its_last_token(family, num_labels, rng):
    import torch
    from transformers import AutoModelForSequenceClassification as Classifier

    stem = tiny.FAMILIES[family][1].removesuffix("ForCausalLM")
    named = {"architectures": [f"{stem}ForSequenceClassification"], "num_labels": num_labels}
    torch.manual_seed(0)
    oracle = Classifier.from_config(tiny.tiny_config(family, pad_token_id=2, **named)).eval()
    model = ours(oracle)
    found = embedder(pooling="lasttoken", activation="identity", normalizes=False)
    prompts = [3 + ids for ids in random_prompts(rng, LENGTHS, 300)]
    hidden, _ = model(whole(prompts, 30), None)
    with torch.no_grad():
        expected = [oracle(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in prompts]
    np.testing.assert_allclose(found(model, hidden, whole(prompts, 30)), expected, atol=1e-5)


def test_the_matrix_for_the_next_token_is_not_kept_where_there_is_no_such_head():
    hf = tiny.tiny_config("qwen3", tie_word_embeddings=False)
    bare = models.read_config(hf.to_dict() | {"architectures": ["Qwen3Model"]})
    assert (bare.architecture, bare.head) == ("Qwen3ForCausalLM", None)
    assert "lm_head" not in models.checkpoint_pieces(bare)
    assert models.is_ignorable("lm_head.weight", bare)
    paths = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: models.build(bare))))
    assert not {"lm_head", "score"} & {path[0] for path, _ in paths}


@pytest.mark.oracle
def test_logits_of_an_encoder_without_labels_are_refused():
    with pytest.raises(ValueError, match="no classifier"):
        ours(tiny_encoder("BertModel")).logits(jnp.zeros((1, 64)))
