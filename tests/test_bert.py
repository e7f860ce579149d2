"""Encoders against transformers on PyTorch in float32, row by row and together."""

from copy import deepcopy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array
from test_models import ragged, random_prompts

from jaxengine import models
from jaxengine.models.bidirectional_attention import BLOCK, attend_both_ways
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.models.interface import Batch

LENGTHS = (1, 2, 17, 65, 101)
FAMILIES = {"BertModel": 0, "RobertaModel": 1, "XLMRobertaModel": 1}  # and their padding's id


def tiny_encoder(architecture: str, **overrides: Any) -> Any:
    """A transformers model of two layers with random weights, none of them small."""
    torch = pytest.importorskip("torch", reason="transformers' models are the oracle")
    import transformers

    family = architecture.removesuffix("Model").removesuffix("ForSequenceClassification")
    config = getattr(transformers, f"{family}Config")(
        architectures=[architecture],
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        pad_token_id=0 if family == "Bert" else 1,
        **overrides,
    )
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5)
    return model


def ours(oracle: Any, dtype: str = "float32") -> Any:
    """The same model here."""
    config = models.read_config(oracle.config.to_dict() | {"dtype": dtype})
    graph, state = nnx.split(nnx.eval_shape(lambda: models.build(config)))
    tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    pieces = models.checkpoint_pieces(config)
    is_bare = not any(name.startswith(models.base_prefix(config)) for name in tensors)
    prefix = models.base_prefix(config) if is_bare else ""

    def fill(path: Any, parameter: Any) -> Any:
        value = np.full(parameter.shape, np.nan, np.float32)
        for name, index in pieces.pop(".".join(map(str, path))):
            tensor = tensors.pop(name.removeprefix(prefix))
            value[index] = tensor.reshape(value[index].shape)
        return parameter.replace(jnp.asarray(value, parameter.dtype))

    state = nnx.map_state(fill, state)
    assert not pieces
    assert all(models.is_ignorable(name, config) for name in tensors)
    return nnx.merge(graph, state)


def prompts_of(rng: np.random.Generator, lengths: Any = LENGTHS) -> list[np.ndarray]:
    return [2 + ids for ids in random_prompts(rng, lengths, vocab_size=318)]  # none is padding


def whole(prompts: Any, num_tokens: int | None = None) -> Batch:
    return ragged(prompts, [0] * len(prompts), [len(ids) for ids in prompts], None, num_tokens)


def hidden_states(model: Any, prompts: Any, num_tokens: int | None = None) -> list[np.ndarray]:
    hidden, _ = model(whole(prompts, num_tokens), None)
    ends = np.cumsum([len(ids) for ids in prompts])
    return np.split(np.asarray(hidden)[: ends[-1]], ends[:-1])


@pytest.mark.oracle
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_hidden_states_are_those_of_transformers(architecture, activation, rng):
    import torch

    oracle = tiny_encoder(architecture, hidden_act=activation)
    prompts = prompts_of(rng)
    got = hidden_states(ours(oracle), prompts, num_tokens=sum(LENGTHS) + 7)
    for ids, states in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, expected, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta"])
def test_labels_have_the_logits_of_transformers(family, num_labels, rng):
    import torch

    oracle = tiny_encoder(f"{family}ForSequenceClassification", num_labels=num_labels)
    model = ours(oracle)
    for ids in prompts_of(rng):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(ids)[None]).logits.numpy()
        hidden, _ = model(whole([ids]), None)
        np.testing.assert_allclose(model.logits(hidden[:1]), expected, atol=1e-5)


@pytest.mark.oracle
def test_the_segment_of_a_token_travels_in_its_id(rng):
    import torch

    oracle = tiny_encoder("BertModel")
    [ids] = prompts_of(rng, [30])
    types = np.repeat([0, 1], [12, 18])
    with torch.no_grad():
        out = oracle(torch.from_numpy(ids)[None], token_type_ids=torch.from_numpy(types)[None])
    [got] = hidden_states(ours(oracle), [ids + 320 * types])
    np.testing.assert_allclose(got, out.last_hidden_state[0].numpy(), atol=1e-5)


@pytest.mark.oracle
def test_in_bfloat16_the_error_is_at_most_twice_that_of_transformers(rng):
    import torch

    oracle = tiny_encoder("BertModel").bfloat16()
    prompts = prompts_of(rng)
    rounded = ours(oracle.float(), "bfloat16")
    with torch.no_grad():
        exact, naive = (
            np.concatenate(
                [m(torch.from_numpy(i)[None]).last_hidden_state[0].float().numpy() for i in prompts]
            )
            for m in (deepcopy(oracle).double(), oracle.bfloat16())
        )
    error = np.concatenate(hidden_states(rounded, prompts)) - exact
    assert np.abs(error).max() <= 2 * np.abs(naive - exact).max()
    assert np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean((naive - exact) ** 2))


@pytest.mark.oracle
def test_a_row_does_not_depend_on_its_neighbours_and_none_suffers_from_another(rng):
    model = ours(tiny_encoder("BertModel"))
    prompts = prompts_of(rng, (5, 140, 3))
    alone = [hidden_states(model, [ids])[0] for ids in prompts]
    together = hidden_states(model, prompts, num_tokens=160)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    prompts[1][7] = 3 * 320  # no segment has it
    poisoned = hidden_states(model, prompts, num_tokens=160)
    assert np.isnan(poisoned[1]).all()
    np.testing.assert_array_equal(poisoned[0], together[0])
    np.testing.assert_array_equal(poisoned[2], together[2])


def rows_attended(q, k, v, lengths):
    """By the textbook, row by row, in float64."""
    outs, start = [], 0
    for length in filter(None, lengths):
        own = np.s_[start : start + length]
        scores = np.einsum("qnh,knh->nqk", q[own], k[own]) / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        outs.append(np.einsum("nqk,knh->qnh", weights, v[own]))
        start += length
    return np.concatenate(outs)


@pytest.mark.parametrize(
    "lengths, num_tokens",
    [
        ((1,), 1),
        ((3, 4), 9),
        ((BLOCK - 1, BLOCK, BLOCK + 1), 3 * BLOCK),
        ((1, 2 * BLOCK + 1, 0, 5), 2 * BLOCK + 50),
        ((700, 3), 703),
    ],
)
def test_attention_over_blocks_is_that_over_rows(lengths, num_tokens, rng):
    qkv = rng.standard_normal((num_tokens, 3, 2, 8))
    batch = whole([np.zeros(length, int) for length in lengths], num_tokens)
    got = attend_both_ways(jnp.asarray(qkv, jnp.float32), batch, scale=8**-0.5)
    total = sum(lengths)
    q, k, v = np.moveaxis(qkv[:total], 1, 0)
    expected = rows_attended(q, k, v, lengths)
    np.testing.assert_allclose(np.asarray(got)[:total], expected, atol=3e-6)
    assert np.isfinite(got).all()


def test_scores_of_a_large_batch_are_never_all_in_memory():
    batch = whole([np.zeros(512, int)] * 16)
    qkv = jax.ShapeDtypeStruct((8192, 3, 12, 32), jnp.float32)
    attend = jax.jit(lambda qkv, batch: attend_both_ways(qkv, batch, scale=1.0))
    memory = attend.lower(qkv, batch).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 8192 * 8192 * 4  # of one head alone


def test_layers_of_one_structure_are_lowered_once():
    config = EncoderConfig.from_dict(BERT | {"num_hidden_layers": 5})
    graph, state = nnx.split(nnx.eval_shape(lambda: models.build(config)))
    leaves, tree = jax.tree.flatten(state)

    def step(leaves: tuple[Array, ...], batch: Batch) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(batch, None)[0]

    text = jax.jit(step).lower(tuple(leaves), whole([np.zeros(3, int)])).as_text()
    assert text.count("func.func private @_run") == 1
    assert text.count("call @_run") == 5


BERT = {
    "architectures": ["BertModel"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_a_minimal_config_gets_the_defaults_of_transformers():
    config = EncoderConfig.from_dict(BERT)
    assert (config.hidden_act, config.layer_norm_eps, config.num_token_types) == ("gelu", 1e-12, 2)
    assert (config.head, config.num_labels, config.position_offset) == (None, 0, 0)
    roberta = EncoderConfig.from_dict(BERT | {"architectures": ["XLMRobertaModel"]})
    assert (roberta.position_offset, roberta.max_position) == (2, 126)


def test_a_classifier_has_as_many_labels_as_are_named():
    classifier = BERT | {"architectures": ["BertForSequenceClassification"]}
    assert EncoderConfig.from_dict(classifier).num_labels == 2
    assert EncoderConfig.from_dict(classifier | {"id2label": {"0": "x"}}).num_labels == 1
    assert EncoderConfig.from_dict(classifier | {"num_labels": 5}).num_labels == 5


@pytest.mark.parametrize(
    "change, named",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "swish"}, "hidden_act.*gelu.*swish"),
        ({"num_attention_heads": 5}, "num_attention_heads.*divisor of hidden_size = 64, got 5"),
        ({"logit_scale": 2}, "logit_scale = 2"),
        ({"dtype": "int8"}, "dtype.*int8"),
        ({"architectures": ["BertForCausalLM"]}, "architectures.*BertForCausalLM"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        models.read_config(BERT | change)
