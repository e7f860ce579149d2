"""The step: what it lowers to, what it aliases, what it writes where."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from jaxengine import models, programs
from jaxengine.compiling import Bucket
from jaxengine.memory import num_bytes
from jaxengine.models.config import ModelConfig
from jaxengine.models.shapes import SHAPES
from jaxengine.programs import RequestState
from jaxengine.runner import StepPrograms
from jaxengine.sampling import empty_state


def step_programs(config: ModelConfig, dtype: str, context_length: int = 64) -> StepPrograms:
    abstract = nnx.eval_shape(lambda: models.build(config, dtype=dtype))
    graphdef, params = nnx.split(abstract)
    return StepPrograms(
        graphdef,
        params,
        num_layers=config.num_layers,
        page_shape=(config.num_kv_heads, 16, config.head_size),
        cache_dtype=dtype,
        num_slots=4,
        context_length=context_length,
        num_stop_ids=2,
        num_bias=8,
        device=jax.devices()[0],
    )


@pytest.fixture(scope="module")
def tiny() -> StepPrograms:
    return step_programs(ModelConfig.from_dict(tiny_config("qwen3").to_dict()), "float32")


@pytest.mark.parametrize("bucket", [Bucket(4, 4), Bucket(32, 4)], ids=["decode", "extend"])
def test_a_step_keeps_pool_and_state_in_place(tiny: StepPrograms, bucket: Bucket) -> None:
    analysis = tiny.lower_step(bucket, num_pages=500).compile().memory_analysis()
    state = tiny.state_shapes
    kept = num_bytes((tiny.cache_shapes(500), state.tokens, state.page_table))
    assert analysis.alias_size_in_bytes >= kept
    assert analysis.temp_size_in_bytes < num_bytes(tiny.cache_shapes(500)) / 2


def test_installing_a_request_keeps_the_state_in_place(tiny: StepPrograms) -> None:
    analysis = tiny.lower_install().compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= num_bytes(tiny.state_shapes)


@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "llama-3.1-8b"])
def test_steps_of_real_models_lower_for_cuda(shape: str) -> None:
    config = ModelConfig.from_dict(SHAPES[shape])
    steps = step_programs(config, "bfloat16", context_length=8192)
    state = steps.state_shapes
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), steps.params)
    rows = jax.ShapeDtypeStruct((4, programs.NUM_ROW_FIELDS), np.int32)
    for num_tokens in (4, 256):
        step = jax.jit(partial(steps._step, num_tokens=num_tokens), donate_argnums=(1, 2, 3))
        shapes = (params, steps.cache_shapes(9), state.tokens, state.page_table, state.sampling)
        bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
        text = step.trace(*bare, rows).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("func.func private @_run") == 1, "layers of one kind are lowered once"


class Echo:
    """A model whose hidden state is the token and whose likeliest next token is the one after."""

    def __call__(self, batch: Any, cache: Any) -> Any:
        self.batch = batch
        return batch.tokens[:, None].astype(jnp.float32), cache

    def logits(self, hidden: Any) -> Any:
        return jax.nn.one_hot(hidden[:, 0].astype(jnp.int32) + 1, 50)


def test_a_step_reads_and_writes_the_history_of_its_slots() -> None:
    tokens, page_table = programs.empty_tables(num_slots=4, context_length=40, page_size=16)
    tokens = tokens.at[0, :5].set(jnp.arange(10, 15)).at[2, :20].set(jnp.arange(20, 40))
    page_table = page_table.at[2, 0].set(7)
    state = RequestState(tokens, page_table, empty_state(5, 2, 8))
    cache = (jnp.zeros((9, 2, 1, 16, 2)),)
    rows = np.array(
        [
            [2, 16, 4, 8, 1],  # the rest of a prompt, on a new page
            [0, 1, 3, 0, 0],  # a chunk in the middle of another
            [4, 0, 0, 0, 0],  # padding
        ],
        np.int32,
    )
    model = Echo()
    _, after, drawn = programs.step(model, cache, state, jnp.asarray(rows), num_tokens=10)
    np.testing.assert_array_equal(model.batch.tokens[:7], [36, 37, 38, 39, 11, 12, 13])
    np.testing.assert_array_equal(model.batch.positions[:7], [16, 17, 18, 19, 1, 2, 3])
    np.testing.assert_array_equal(model.batch.rows, [0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    np.testing.assert_array_equal(model.batch.kv_lens, [20, 4, 0])
    np.testing.assert_array_equal(after.page_table[2], [7, 8, 0])
    assert drawn[0] == 40
    assert drawn[1] == 14
    assert after.tokens[2, 20] == 40, "a row that samples writes its token behind the last"
    np.testing.assert_array_equal(after.tokens[0], tokens[0], "the next token was known already")
    np.testing.assert_array_equal(after.tokens[4], tokens[4])
