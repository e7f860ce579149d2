import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jaxtyping import TypeCheckError
from numerics import OPTIMIZED, assert_near_exact

from jaxengine.models import build, checkpoint_pieces, is_ignorable
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import Batch, dense_batch, rows_of
from jaxengine.models.shapes import SHAPES
from jaxengine.pallas_kernels.dispatch import XLA, Kernels

LENGTHS = (1, 2, 17, 65, 101)
WINDOWS = {
    "mistral": {"sliding_window": 7},
    "qwen2": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {
        "sliding_window": 7,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
VARIANTS = {
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 80, "num_attention_heads": 2}),
    "mistral-head-96": ("mistral", {"head_dim": 96}),
    "qwen2-head-64": ("qwen2", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3-head-128": ("qwen3", {"head_dim": 128, "attention_bias": True}),
    "qwen3-head-256": ("qwen3", {"head_dim": 256, "num_attention_heads": 2}),
}


def config_of(hf, dtype="float32"):
    return ModelConfig.from_dict(hf.to_dict() | {"dtype": dtype})


def filled(hf, tensors, dtype="float32"):
    """The model with its parameters put together from checkpoint tensors."""
    config = config_of(hf, dtype)
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config)))
    pieces = checkpoint_pieces(config)

    def fill(path, parameter):
        value = np.full(parameter.shape, np.nan, np.float32)
        for name, index in pieces.pop(".".join(map(str, path))):
            value[index] = tensors[name].reshape(value[index].shape)
        return parameter.replace(jnp.asarray(value, parameter.dtype))

    state = nnx.map_state(fill, state)
    assert not pieces
    return nnx.merge(graph, state)


def oracle(hf, tensors, dtype="float32"):
    torch = pytest.importorskip("torch", reason="transformers' models are the oracle")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager")
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    if hf.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.to(getattr(torch, dtype)).eval()


def oracle_logits(hf, tensors, prompts, dtype="float32"):
    import torch

    with torch.no_grad():
        # A new model each time: `dynamic` remembers the longest sequence that it has seen.
        return [
            oracle(hf, tensors, dtype)(torch.from_numpy(ids)[None]).logits[0].float().numpy()
            for ids in prompts
        ]


def random_prompts(rng, lengths, vocab_size=320):
    return [rng.integers(0, vocab_size, length) for length in lengths]


def ragged(chunks, starts, prompt_lens, page_table=None, num_tokens=None):
    """A batch whose row i runs `chunks[i]` from position `starts[i]` on, padded to `num_tokens`."""
    lengths = np.array([len(chunk) for chunk in chunks])
    num_tokens = num_tokens or lengths.sum()
    padding = num_tokens - lengths.sum()
    positions = np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])
    if page_table is None:
        page_table = np.zeros((len(chunks), 0))
    rows = np.repeat(np.arange(len(chunks)), lengths)
    arrays = dict(
        tokens=np.pad(np.concatenate(chunks), (0, padding)),
        positions=np.pad(positions, (0, padding)),
        rows=np.pad(rows, (0, padding), constant_values=len(chunks)),
        query_starts=np.cumsum(lengths) - lengths,
        query_lens=lengths,
        kv_lens=np.where(lengths, np.array(starts) + lengths, 0),
        prompt_lens=prompt_lens,
        page_table=page_table,
    )
    return Batch(**{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()})


def decoding(chunks, starts, prompt_lens, page_table):
    """The same of rows of one token or none, as a decode batch."""
    lengths, starts = np.array([len(chunk) for chunk in chunks]), np.array(starts)
    arrays = dict(
        tokens=[chunk[0] if len(chunk) else 0 for chunk in chunks],
        positions=np.where(lengths, starts, 0),
        rows=np.where(lengths, np.arange(len(chunks)), len(chunks)),
        query_lens=lengths,
        kv_lens=np.where(lengths, starts + 1, 0),
        prompt_lens=prompt_lens,
        page_table=page_table,
    )
    arrays = {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}
    return Batch(query_starts=None, **arrays)


def dense_logits(model, prompts):
    lengths = [len(ids) for ids in prompts]
    hidden, _ = model(ragged(prompts, [0] * len(prompts), lengths), None)
    return np.split(np.asarray(model.logits(hidden)), np.cumsum(lengths)[:-1])


def assert_same_logits(got, expected):
    got, expected = np.concatenate(got), np.concatenate(expected)
    size = np.sqrt(np.mean(expected**2))
    error = got - expected
    assert np.abs(error).max() < 1e-4 * size
    assert np.sqrt(np.mean(error**2)) < 2e-6 * size


def assert_agrees_with_transformers(hf, rng):
    tensors = tiny.random_tensors(hf, seed=3)
    prompts = random_prompts(rng, LENGTHS)
    got = dense_logits(filled(hf, tensors), prompts)
    assert_same_logits(got, oracle_logits(hf, tensors, prompts))


@pytest.mark.oracle
@pytest.mark.parametrize("rope", tiny.ROPES)
@pytest.mark.parametrize("heads", tiny.HEADS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_those_of_transformers(family, heads, rope, rng):
    assert_agrees_with_transformers(tiny.tiny_config(family, heads=heads, rope=rope), rng)


@pytest.mark.oracle
@pytest.mark.parametrize("heads", tiny.HEADS)
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_are_those_of_transformers(family, heads, rng):
    assert_agrees_with_transformers(tiny.tiny_config(family, heads=heads, **WINDOWS[family]), rng)


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_transformers(variant, rng):
    family, overrides = VARIANTS[variant]
    assert_agrees_with_transformers(tiny.tiny_config(family, **overrides), rng)


@pytest.mark.oracle
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_bfloat16_the_error_is_at_most_twice_that_of_transformers(family, rng):
    hf = tiny.tiny_config(family)
    rounded = {
        name: np.asarray(jnp.asarray(tensor, jnp.bfloat16), np.float32)
        for name, tensor in tiny.random_tensors(hf).items()
    }
    prompts = random_prompts(rng, LENGTHS)
    exact = np.concatenate(oracle_logits(hf, rounded, prompts))
    naive = np.concatenate(oracle_logits(hf, rounded, prompts, "bfloat16")) - exact
    error = np.concatenate(dense_logits(filled(hf, rounded, "bfloat16"), prompts)) - exact
    assert np.abs(error).max() <= 2 * np.abs(naive).max()
    assert np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean(naive**2))


def paged_logits(model, sequences, prompt_lens, chunk=16, page_size=4, kernels=XLA):
    """Logits of every token, prompts in chunks and the rest one by one, over a shuffled page pool.

    Rows take turns and lengths differ, so that steps mix chunks, single tokens and empty rows.
    """
    config, num_rows = model.config, len(sequences)
    pages_per_row = -(-max(map(len, sequences)) // page_size)
    ids = np.random.default_rng(1).permutation(num_rows * pages_per_row) + 1
    page_table = ids.reshape(num_rows, pages_per_row)
    shape = (ids.size + 1, 2, config.num_kv_heads, page_size, config.head_size)
    dtype = model.embed_tokens.dtype
    cache = tuple(jnp.full(shape, jnp.nan, dtype) for _ in range(config.num_layers))
    graph, state = nnx.split(model)

    # Interpreted kernels run longer than they compile.
    @partial(jax.jit, compiler_options=OPTIMIZED if kernels.interpret else None)
    def step(state, batch, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model(batch, cache, kernels)
        return model.logits(hidden), cache

    done = np.zeros(num_rows, int)
    logits = [[] for _ in sequences]
    turn = 0
    while (done < [len(ids) for ids in sequences]).any():
        chunks = []
        for row, ids in enumerate(sequences):
            size = min(chunk, prompt_lens[row] - done[row]) if done[row] < prompt_lens[row] else 1
            rests = num_rows > 1 and (turn + row) % 3 == 0
            chunks.append(ids[done[row] : done[row] + (0 if rests else size)])
        if max(map(len, chunks)) == 1:
            batch, starts = decoding(chunks, done, prompt_lens, page_table), range(num_rows)
        else:
            batch = ragged(chunks, done, prompt_lens, page_table, chunk * num_rows)
            starts = np.asarray(batch.query_starts)
        out, cache = step(state, batch, cache)
        for row, start in enumerate(starts):
            logits[row].append(np.asarray(out)[start : start + len(chunks[row])])
            done[row] += len(chunks[row])
        turn += 1
    return [np.concatenate(parts) for parts in logits]


@pytest.mark.parametrize(
    "family, rope, overrides",
    [
        ("llama", "default", {}),
        ("llama", "llama3", {"num_key_value_heads": 1}),
        ("mistral", "linear", WINDOWS["mistral"]),
        ("qwen2", "yarn", WINDOWS["qwen2"]),
        ("qwen3", "default", WINDOWS["qwen3"] | {"num_key_value_heads": 4}),
    ],
)
def test_chunks_over_a_paged_cache_give_the_logits_of_one_pass(family, rope, overrides, rng):
    hf = tiny.tiny_config(family, rope=rope, **overrides)
    model = filled(hf, tiny.random_tensors(hf))
    sequences = random_prompts(rng, (3, 4, 5, 17, 41))
    got = paged_logits(model, sequences, prompt_lens=[1, 4, 2, 17, 37])
    assert_same_logits(got, dense_logits(model, sequences))


INTERPRETED = Kernels(
    decode="triton", extend="triton", rotation="triton", max_few_rows=4, interpret=True
)


@pytest.mark.parametrize(
    "family, overrides, splits",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, False),
        ("qwen2", WINDOWS["qwen2"], True),
        ("qwen3", {"num_key_value_heads": 1, "rope_scaling": None}, False),
    ],
    ids=["biases", "window", "head norms"],
)
def test_kernels_give_the_logits_of_the_reference(family, overrides, splits, rng):
    hf = tiny.tiny_config(family, head_dim=64, **overrides)
    tensors = tiny.random_tensors(hf)
    sequences = random_prompts(rng, (5, 17, 38))
    how: dict[str, Any] = dict(prompt_lens=[1, 16, 35], chunk=16, page_size=16)
    exact = np.concatenate(dense_logits(filled(hf, tensors), sequences))
    model = filled(hf, tensors, "bfloat16")
    naive, got = (
        np.concatenate(paged_logits(model, sequences, kernels=kernels, **how))
        for kernels in (XLA, replace(INTERPRETED, splits_single_rows=splits))
    )
    assert_near_exact(got, exact.astype(np.float64), naive)


@pytest.mark.oracle
def test_dynamic_rope_over_a_cache_is_prefill_then_decode_of_transformers(rng):
    hf = tiny.tiny_config("llama", rope="dynamic")
    tensors = tiny.random_tensors(hf)
    sequences = random_prompts(rng, (38, 38, 50))
    prompt_lens = [5, 32, 41]  # below the original 32, at it, beyond it
    got = paged_logits(filled(hf, tensors), sequences, prompt_lens)
    expected = [
        prefill_then_decode(oracle(hf, tensors), ids, prompt_len)
        for ids, prompt_len in zip(sequences, prompt_lens, strict=True)
    ]
    assert_same_logits(got, expected)


def prefill_then_decode(model, ids, prompt_len):
    import torch
    from transformers import DynamicCache

    logits, cache = [], DynamicCache()
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # its name before 5.24
    with torch.no_grad():
        for chunk in [ids[:prompt_len], *ids[prompt_len:, None]]:
            out = model(torch.from_numpy(chunk)[None], use_cache=True, **{name: cache})
            logits.append(out.logits[0].numpy())
    return np.concatenate(logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoint_tensors_and_parameters_match_one_to_one(family):
    hf = tiny.tiny_config(family)
    config = config_of(hf)
    pieces = checkpoint_pieces(config)
    names = [piece.name for parts in pieces.values() for piece in parts]
    assert sorted(names) == sorted(tiny.random_tensors(hf))
    paths = [".".join(map(str, path)) for path, _ in flat_parameters(config)]
    assert sorted(paths) == sorted(pieces)


def flat_parameters(config, **kwargs):
    return nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build(config, **kwargs))))


def test_every_parameter_names_its_axes_and_has_the_dtype_asked_for():
    config = ModelConfig.from_dict(SHAPES["qwen3-8b"])
    for _, parameter in flat_parameters(config):
        assert len(parameter.axes) == len(parameter.shape)
        assert parameter.dtype == jnp.bfloat16
    parameters = dict(flat_parameters(config, dtype="float32"))
    qkv = parameters["layers", 35, "attention", "qkv"]
    assert qkv.axes == ("kv_heads", "qkv", "head", "embed")
    assert qkv.shape == (8, 4 + 2, 128, 4096) and qkv.dtype == jnp.float32


@pytest.mark.parametrize(
    "name, billions", [("llama-3.1-8b", 8.03), ("llama-3.2-1b", 1.236), ("qwen2.5-0.5b", 0.494)]
)
def test_published_shapes_have_the_published_number_of_parameters(name, billions):
    parameters = flat_parameters(ModelConfig.from_dict(SHAPES[name]))
    assert sum(p.size for _, p in parameters) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_duplicate_head_is_ignorable_only_when_tied():
    tied = config_of(tiny.tiny_config("llama", tie_word_embeddings=True))
    assert is_ignorable("lm_head.weight", tied)
    assert not is_ignorable("lm_head.weight", config_of(tiny.tiny_config("llama")))
    assert is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", tied)
    assert not is_ignorable("model.layers.0.self_attn.q_proj.weight", tied)


def test_layers_of_one_structure_are_lowered_once():
    hf = tiny.tiny_config("qwen3", num_hidden_layers=5, layer_types=None)
    config = config_of(hf)
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config)))
    leaves, tree = jax.tree.flatten(state)

    def step(leaves, batch):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(batch, None)[0]

    batch = dense_batch(jnp.zeros(3, jnp.int32))
    text = jax.jit(step).lower(tuple(leaves), batch).as_text()
    assert text.count("func.func private @_run") == 1
    assert text.count("call @_run") == 5


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(rng):
    hf = tiny.tiny_config("llama")
    model = filled(hf, tiny.random_tensors(hf))
    prompts = random_prompts(rng, (5, 11, 3))
    together, _ = model(ragged(prompts, [0, 0, 0], [5, 11, 3], num_tokens=23), None)
    alone, _ = model(dense_batch(jnp.asarray(prompts[1], jnp.int32)), None)
    np.testing.assert_allclose(together[5:16], alone, atol=1e-5)
    assert jnp.isfinite(together).all()


def test_a_token_outside_the_vocabulary_poisons_its_row_alone():
    hf = tiny.tiny_config("llama")
    model = filled(hf, tiny.random_tensors(hf))
    sequences = [np.array(ids) for ids in ([1, 320, 3], [1, -1, 3], [1, 2, 3])]
    logits = paged_logits(model, sequences, prompt_lens=[3, 2, 3])
    for poisoned in logits[:2]:
        assert np.isnan(poisoned[1:]).all()
    assert np.isfinite(logits[2]).all()


def test_gradients_reach_every_parameter_through_vmap(rng):
    hf = tiny.tiny_config("qwen3", heads="mqa")
    graph, state = nnx.split(filled(hf, tiny.random_tensors(hf)))
    tokens = jnp.asarray(rng.integers(0, 320, (2, 9)), jnp.int32)

    def loss(state):
        model = nnx.merge(graph, state)
        logits = jax.vmap(lambda ids: model.logits(model(dense_batch(ids), None)[0]))(tokens)
        return -jax.nn.log_softmax(logits)[:, :, 7].mean()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(state)):
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0


def test_shapes_are_checked_in_tests():
    hf = tiny.tiny_config("llama")
    model = filled(hf, tiny.random_tensors(hf))
    with pytest.raises(TypeCheckError):
        model.logits(jnp.zeros((3, 64, 1)))


def test_rows_of_skips_empty_rows_and_marks_padding():
    rows = rows_of(jnp.asarray([2, 0, 1, 0], jnp.int32), 5)
    np.testing.assert_array_equal(rows, [0, 0, 2, 4, 4])
