"""Rows whose tokens stand alone, as where one decodes, come to the same as rows that read them."""

from array import array
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
from jaxengine.hidden_states import WantedStates
from jaxengine.launch import NUM_ROW_FIELDS, Variant
from jaxengine.logprobs import Wanted
from jaxengine.models.config import ModelConfig
from jaxengine.packing import pack, padding
from jaxengine.request import Request
from jaxengine.request_state import empty_request_state
from jaxengine.sampling_params import SamplingParams
from jaxengine.step_plan import MAX_UNSENT, NOBODY_ASKS, Row, StepPlan

NOBODY = 4
READ = Variant("read")


def row(
    slot: int, start: int, query_len: int, *, page: int = 0, draws: int = 1, **more: Any
) -> Row:
    request = Request(
        rid=str(slot),
        prompt_ids=array("I", [1]),
        sampling=SamplingParams(),
        max_new_tokens=9,
        stop_token_ids=frozenset(),
        seed=0,
    )
    return Row(request, slot, start, query_len, page, draws, **more)


def plan(*rows: Row, **more: Any) -> StepPlan:
    num_tokens = sum(row.query_len for row in rows)
    return StepPlan(rows, (), (), num_tokens, 0, pauses=True, **more)


FORCED = plan(
    row(0, 14, 5, page=3, new_tokens=(31, 32, 33)),  # over the end of a page
    row(2, 20, 1),
    row(3, 9, 3, draws=0, write_start=10, tell_start=9),  # the middle of a prompt, one token cached
)


def test_each_token_has_a_row_and_the_last_ones_come_first() -> None:
    packed = pack(FORCED, Bucket(12, 4, 1), READ, NOBODY)
    fields, new_tokens, _ = READ.split(packed)
    np.testing.assert_array_equal(
        fields[:10],
        [
            [0, 18, 1, 0, 1, 0, NOBODY_ASKS],
            [2, 20, 1, 0, 1, 0, NOBODY_ASKS],
            [3, 11, 1, 0, 0, 10, 9],
            [0, 14, 1, 3, 0, 0, NOBODY_ASKS],  # the page begins at the next position where one does
            [0, 15, 1, 0, 0, 0, NOBODY_ASKS],
            [0, 16, 1, 0, 0, 0, NOBODY_ASKS],
            [0, 17, 1, 0, 0, 0, NOBODY_ASKS],
            [3, 9, 1, 0, 0, 10, 9],
            [3, 10, 1, 0, 0, 10, 9],
            [NOBODY, 0, 0, 0, 0, 0, 0],
        ],
    )
    np.testing.assert_array_equal(new_tokens[0], [-1] * (MAX_UNSENT - 3) + [31, 32, 33])
    assert (new_tokens[1:] == -1).all()


def test_a_step_that_reads_has_rows_as_they_are() -> None:
    fields, new_tokens, _ = READ.split(pack(FORCED, Bucket(32, 4), READ, NOBODY))
    np.testing.assert_array_equal(fields[0], [0, 14, 5, 3, 1, 0, NOBODY_ASKS])
    np.testing.assert_array_equal(new_tokens[0, -3:], [31, 32, 33])
    np.testing.assert_array_equal(fields[3], [NOBODY, 0, 0, 0, 0, 0, 0])
    assert NUM_ROW_FIELDS == fields.shape[1]


@pytest.mark.parametrize(
    ("steps", "spreads"),
    [
        (plan(row(0, 5, 1), row(1, 5, 1)), True),
        (plan(row(0, 5, 1 + MAX_UNSENT)), True),
        (plan(row(0, 5, 2 + MAX_UNSENT)), False),  # it would read its context for each
        (plan(*(row(slot, 5, 2) for slot in range(40))), True),
        (plan(*(row(slot, 5, 3) for slot in range(40))), False),
        (plan(row(0, 5, 2), wanted=Wanted(0, 0, True)), False),  # told in the order of tokens
        (plan(row(0, 5, 2), wanted=Wanted(0, 0, False)), True),
        (plan(row(0, 5, 2), states=WantedStates((("output", 1),), True)), False),
    ],
)
def test_few_tokens_stand_alone(steps: StepPlan, spreads: bool) -> None:
    assert steps.spreads is spreads


def test_logits_pool_and_histories_are_those_of_rows_that_read() -> None:
    config = ModelConfig.from_dict(tiny_config("qwen3").to_dict())
    model = models.build(config, dtype="float32", rngs=nnx.Rngs(0))
    empty = empty_request_state(NOBODY, 40, 16, num_stop_ids=2, num_bias=8)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, empty.tokens.shape)
    table = empty.page_table.at[:4, 0].set(jnp.array([1, 2, 4, 6])).at[2, 1].set(5)
    state = empty._replace(tokens=jnp.asarray(tokens, jnp.int32), page_table=table)
    shape = (8, 2, config.num_kv_heads, 16, config.head_size)
    cache = tuple(jnp.zeros(shape) for _ in range(config.num_cached_layers))
    prompts = plan(row(0, 0, 14), row(2, 0, 20), row(3, 0, 10))
    packed = pack(prompts, Bucket(64, 4), READ, NOBODY)
    cache, state, *_ = run(model, cache, state, packed, num_tokens=64)

    results = [
        run(model, cache, state, pack(FORCED, bucket, READ, NOBODY), **sizes)
        for bucket, sizes in (
            (Bucket(32, 4), {"num_tokens": 32}),
            (Bucket(12, 4, 1), {"num_tokens": None, "num_drawing": 4}),
        )
    ]
    for read, alone in zip(*(result[:3] for result in results), strict=True):
        for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(alone), strict=True):
            if one.shape == shape:
                one, other = one[1:7], other[1:7]  # page 0 is nobody's
            elif one.shape == (4, config.vocab_size):
                one, other = one[:3], other[:3]  # the fourth row is padding
            np.testing.assert_allclose(one, other, atol=2e-5)


def run(model: Any, cache: Any, state: Any, packed: np.ndarray, **sizes: Any) -> Any:
    fields, new_tokens, _ = READ.split(jnp.asarray(packed))
    return partial(programs.read, **sizes)(model, cache, state, fields, new_tokens=new_tokens)


def test_padding_reads_nothing_for_nobody() -> None:
    fields, new_tokens, ids = READ.split(padding(Bucket(3, 2, 1), READ, NOBODY))
    np.testing.assert_array_equal(fields, [[NOBODY, 0, 0, 0, 0, 0, 0]] * 3)
    assert (new_tokens == -1).all() and ids.shape == (3, 0)
