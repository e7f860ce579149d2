"""The step: what it lowers to, what it aliases, what it writes where."""

from array import array
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from flax import nnx
from test_bert import BERT
from tiny import tiny_config

from jaxengine import models, programs
from jaxengine.compiling import Bucket
from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.installs import INSTALL_SIZES, installs
from jaxengine.launch import Asked, Options, Part, Variant
from jaxengine.logprobs import Wanted
from jaxengine.memory import num_bytes
from jaxengine.models.attention import write_pages
from jaxengine.models.config import ModelConfig
from jaxengine.models.embedder import EmbedderConfig
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.models.interface import Batch
from jaxengine.models.layers import project
from jaxengine.models.shapes import SHAPES
from jaxengine.pallas_kernels import dispatch
from jaxengine.pallas_kernels.dispatch import XLA, Kernels, Problem, choose
from jaxengine.request import Request
from jaxengine.request_state import InstallInputs, RequestState, empty_request_state, install
from jaxengine.sampling import num_fields
from jaxengine.sampling_params import SamplingParams
from jaxengine.step_plan import NOBODY_ASKS
from jaxengine.step_programs import (
    CUBLAS_OPTIONS,
    LONG_OPTIONS,
    StepPrograms,
    compiler_options,
)


def step_programs(
    config: ModelConfig | EncoderConfig,
    dtype: str,
    context_length: int = 64,
    kernels: Kernels = XLA,
    functions: Functions = NO_FUNCTIONS,
    embedder: EmbedderConfig | None = None,
) -> StepPrograms:
    abstract = nnx.eval_shape(lambda: models.build(config, dtype=dtype, embedder=embedder))
    graphdef, params = nnx.split(abstract)
    return StepPrograms(
        graphdef,
        params,
        num_layers=config.num_cached_layers,
        vocab_size=config.vocab_size,
        page_shape=(config.num_kv_heads, 16, config.head_size),
        cache_dtype=dtype,
        num_slots=4,
        context_length=context_length,
        num_stop_ids=2,
        num_bias=8,
        device=jax.devices()[0],
        kernels=kernels,
        functions=functions,
        embeds=embedder is not None,
    )


@pytest.fixture(scope="module")
def tiny() -> StepPrograms:
    return step_programs(ModelConfig.from_dict(tiny_config("qwen3").to_dict()), "float32")


BUCKETS = {"decode": Bucket(4, 4, 1), "several steps": Bucket(4, 4, 3), "extend": Bucket(32, 4)}


@pytest.mark.parametrize("bucket", BUCKETS.values(), ids=BUCKETS)
def test_a_step_keeps_pool_and_state_in_place(tiny: StepPrograms, bucket: Bucket) -> None:
    analysis = tiny.trace_step(bucket, num_pages=500)().memory_analysis()
    state = tiny.state_shapes
    kept = num_bytes((tiny.cache_shapes(500), state.tokens, state.page_table))
    assert analysis.alias_size_in_bytes >= kept
    assert analysis.temp_size_in_bytes < num_bytes(tiny.cache_shapes(500)) / 2


@pytest.mark.parametrize("bucket", [Bucket(4, 4, 1), Bucket(20, 4, 1), Bucket(32, 4)])
def test_a_step_that_pauses_keeps_its_logits_in_place(tiny: StepPrograms, bucket: Bucket) -> None:
    analysis = tiny.trace_step(bucket, 500, Variant("read"))().memory_analysis()
    state = tiny.state_shapes
    kept = (tiny.cache_shapes(500), state.tokens, state.page_table, tiny.logits_shape(4))
    assert analysis.alias_size_in_bytes >= num_bytes(kept)


def test_only_rows_of_different_sequences_attend_before_others_have_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decode kernel that writes K and V itself is not for rows that see what another one does."""
    calls = []

    def fused(kernels: Kernels) -> Any:
        calls.append(kernels.fuses_decode)
        return None

    monkeypatch.setattr(dispatch, "rotate_write_and_decode", fused)
    config = ModelConfig.from_dict(tiny_config("qwen3").to_dict())
    programs = step_programs(config, "float32", kernels=replace(XLA, fuses_decode=True))
    for bucket, variant, is_fused in (
        (Bucket(4, 4, 2), None, True),
        (Bucket(4, 4, 1), Variant("read"), True),
        (Bucket(20, 4, 1), Variant("read"), False),
    ):
        calls.clear()
        jax.clear_caches()
        programs.lower_step(bucket, 500, variant)
        assert set(calls) == {is_fused}


def test_installing_a_request_keeps_the_state_in_place(tiny: StepPrograms) -> None:
    for size in INSTALL_SIZES:
        analysis = tiny.trace_install(size)().memory_analysis()
        assert analysis.alias_size_in_bytes >= num_bytes(tiny.state_shapes)


@pytest.mark.parametrize(
    ("num_requests", "length", "sizes"),
    [(0, 1, []), (1, 3, [2]), (3, 3, [4]), (6, 3, [4, 2]), (2, 10, [4, 4]), (1, 20, [4, 2])],
)
def test_the_smallest_program_with_room_installs(
    num_requests: int, length: int, sizes: list[int]
) -> None:
    zeros: Any = partial(np.zeros, dtype=np.int32)
    empties = [
        InstallInputs(
            zeros(rows), zeros(rows), zeros(rows), zeros((rows, 1)), zeros((rows, 4)), zeros(tokens)
        )
        for rows, tokens in ((2, 8), (4, 16))
    ]
    requests = [
        Request(
            rid=str(slot),
            prompt_ids=array("I", range(length)),
            sampling=SamplingParams(),
            max_new_tokens=1,
            stop_token_ids=frozenset(),
            seed=0,
            slot=slot,
        )
        for slot in range(num_requests)
    ]
    calls = list(installs(requests, empties, lambda request: zeros(1)))
    assert [len(new.slots) for new in calls] == sizes
    given: dict[int, list[int]] = {}
    for new in calls:
        for slot, end, count in zip(
            new.slots, np.cumsum(new.num_tokens), new.num_tokens, strict=True
        ):
            given.setdefault(int(slot), []).extend(new.tokens[end - count : end].tolist())
    assert given == {slot: list(range(length)) for slot in range(num_requests)}
    assert not any(leaf.any() for empty in empties for leaf in empty)


HOPPER = Problem(capability=(9, 0), dtype="bfloat16", head_size=128, group_size=4, page_size=16)
ALL_KERNELS = {
    "mosaic": choose("mosaic", HOPPER),
    "triton": choose("triton", HOPPER),
    "mixed": choose("mosaic", HOPPER, mixes_decode=True),
    "older": choose("triton", replace(HOPPER, capability=(8, 0))),
}


def lowered_for_cuda(
    steps: StepPrograms, bucket: Bucket, wanted: Wanted | None = None, part: Part | None = None
) -> str:
    variant = Variant(part or steps.plain.part, wanted)
    shapes = steps.step_arguments(bucket, 9, variant)
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    step = partial(steps._step, bucket=bucket, variant=variant)
    return lower_for_cuda(step, *bare, donate=(1, 2)).as_text()


@pytest.mark.parametrize("kernels", ALL_KERNELS.values(), ids=ALL_KERNELS)
@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "llama-3.1-8b"])
def test_steps_of_real_models_lower_for_cuda(shape: str, kernels: Kernels) -> None:
    config = ModelConfig.from_dict(SHAPES[shape])
    kernels = replace(kernels, fuses_decode=kernels.fuses_decode and config.head_size == 128)
    steps = step_programs(config, "bfloat16", context_length=8192, kernels=kernels)
    for bucket in (Bucket(1, 1, 8), Bucket(8, 8, 1), Bucket(256, 4)):
        text = lowered_for_cuda(steps, bucket)
        assert text.count("func.func private @_run") == 1, "layers of one kind are lowered once"


def test_steps_that_tell_of_distributions_lower_for_cuda() -> None:
    config = ModelConfig.from_dict(SHAPES["qwen3-0.6b"] | {"num_hidden_layers": 2})
    kernels = ALL_KERNELS["mosaic"]
    steps = step_programs(config, "bfloat16", context_length=8192, kernels=kernels)
    for bucket in (Bucket(1, 1, 8), Bucket(8, 8, 1), Bucket(1024, 4)):
        text = lowered_for_cuda(steps, bucket, Wanted(8, 8, not bucket.num_steps))
        assert text.count("tf.aliasing_output") == config.num_layers + 2
        assert "1024x151936xf32" not in text, "logits come by blocks"


@pytest.mark.parametrize("kernels", ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_steps_whose_rows_bring_tokens_lower_for_cuda(kernels: Kernels) -> None:
    """As one stretch that a graph can hold, with logits of the rows that draw alone."""
    config = ModelConfig.from_dict(SHAPES["qwen3-0.6b"] | {"num_hidden_layers": 2})
    steps = step_programs(config, "bfloat16", context_length=8192, kernels=kernels)
    text = lowered_for_cuda(steps, Bucket(96, 64, 1), part="read")
    assert text.count("tf.aliasing_output") == config.num_layers + 2
    assert "stablehlo.while" not in text
    assert "64x151936xf32" in text and "96x151936xf32" not in text


def test_steps_that_embed_lower_for_cuda() -> None:
    embedder = EmbedderConfig(pooling="lasttoken", normalizes=True)
    decoder = ModelConfig.from_dict(SHAPES["qwen3-0.6b"] | {"architectures": ["Qwen3Model"]})
    kernels = ALL_KERNELS["mosaic"]
    steps = step_programs(decoder, "bfloat16", 8192, kernels, embedder=embedder)
    text = lowered_for_cuda(steps, Bucket(1024, 256))
    assert text.count("tf.aliasing_output") == decoder.num_layers + 2  # tokens and page table
    assert "151936xf32" not in text, "there are no logits"
    encoder = EncoderConfig.from_dict(BERT)
    mean = replace(embedder, pooling="mean")
    steps = step_programs(encoder, "bfloat16", 128, embedder=mean)
    text = lowered_for_cuda(steps, Bucket(8192, 1024))
    assert text.count("tf.aliasing_output") == 2
    assert text.count("func.func private @_run") == 1
    assert "8192x8192" not in text, "attention is by blocks"


@pytest.mark.parametrize("kernels", ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_a_step_is_one_stretch_that_a_cuda_graph_can_hold(kernels: Kernels) -> None:
    """A loop would end the graph, and a cache that no output aliases would be copied."""
    config = ModelConfig.from_dict(SHAPES["qwen3-0.6b"] | {"num_hidden_layers": 2})
    steps = step_programs(config, "bfloat16", context_length=8192, kernels=kernels)
    for bucket, num_loops in ((Bucket(1, 1, 1), 0), (Bucket(8, 8, 1), 0), (Bucket(8, 8, 8), 1)):
        text = lowered_for_cuda(steps, bucket)
        assert text.count("stablehlo.while") == num_loops
        assert text.count("tf.aliasing_output") == config.num_layers + 2  # tokens and page table
        assert text.count('name = "few_row') == (4 if bucket.num_rows == 1 else 0), "of a layer"


def test_small_products_are_tried_out_where_no_kernel_takes_them():
    few, some, long = Bucket(16, 16, 8), Bucket(64, 64, 8), Bucket(2048, 64)
    for hopper_products in (False, True):
        assert compiler_options(Bucket(2, 2, 8), hopper_products) is None
        assert compiler_options(few, hopper_products) == (
            CUBLAS_OPTIONS if hopper_products else None
        )
        assert compiler_options(some, hopper_products) == CUBLAS_OPTIONS
        assert compiler_options(long, hopper_products) == LONG_OPTIONS


EMPTY = empty_request_state(4, 40, 16, num_stop_ids=2, num_bias=8)


class Echo:
    """A model whose hidden state is the token and whose likeliest next token is the one after."""

    head = None

    def __call__(self, batch: Any, cache: Any, kernels: Any = None, taps: Any = None) -> Any:
        self.batch = batch
        return batch.tokens[:, None].astype(jnp.float32), cache

    def logits(self, hidden: Any) -> Any:
        return jax.nn.one_hot(hidden[:, 0].astype(jnp.int32) + 1, 50)


def test_a_step_reads_and_writes_the_history_of_its_slots() -> None:
    tokens, page_table, *others = EMPTY
    tokens = tokens.at[0, :5].set(jnp.arange(10, 15)).at[2, :20].set(jnp.arange(20, 40))
    page_table = page_table.at[2, 0].set(7)
    state = RequestState(tokens, page_table, *others)
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
    _, after, told = programs.extend(model, cache, state, jnp.asarray(rows), num_tokens=10)
    np.testing.assert_array_equal(model.batch.tokens[:7], [36, 37, 38, 39, 11, 12, 13])
    np.testing.assert_array_equal(model.batch.positions[:7], [16, 17, 18, 19, 1, 2, 3])
    np.testing.assert_array_equal(model.batch.rows, [0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    np.testing.assert_array_equal(model.batch.kv_lens, [20, 4, 0])
    np.testing.assert_array_equal(after.page_table[2], [7, 8, 0])
    np.testing.assert_array_equal(told.drawn[0, :2], [40, 14])
    assert after.tokens[2, 20] == 40, "a row that samples writes its token behind the last"
    np.testing.assert_array_equal(after.tokens[0], tokens[0], "the next token was known already")
    np.testing.assert_array_equal(after.tokens[4], tokens[4])


def test_a_decode_program_goes_on_from_what_it_drew() -> None:
    tokens, page_table, *others = EMPTY
    tokens = tokens.at[0, :15].set(jnp.arange(10, 25)).at[2, :20].set(jnp.arange(20, 40))
    page_table = page_table.at[0, 0].set(7).at[2, :2].set(jnp.array([4, 5]))
    state = RequestState(tokens, page_table, *others)
    cache = (jnp.zeros((9, 2, 1, 16, 2)),)
    rows = np.array(
        [
            [0, 14, 1, 8, 3],  # into a new page with its third token
            [2, 19, 1, 0, 1],  # wants one token of the three
            [3, 5, 1, 0, 0],  # the end of a prompt that nobody wants continued
            [4, 0, 0, 0, 0],  # padding
        ],
        np.int32,
    )
    model = Echo()
    _, after, told = programs.decode(model, cache, state, jnp.asarray(rows), num_steps=3)
    np.testing.assert_array_equal(told.drawn[:, 0], [25, 26, 27])
    assert told.drawn[0, 1] == 40
    np.testing.assert_array_equal(after.tokens[0, :19], [*range(10, 28), 0])
    np.testing.assert_array_equal(after.tokens[2, 19:22], [39, 40, 0])
    np.testing.assert_array_equal(after.tokens[3:], tokens[3:])
    np.testing.assert_array_equal(after.page_table[0], [7, 8, 0])


def test_installing_fills_slots_from_flat_tokens_a_stretch_at_a_time() -> None:
    width = num_fields(EMPTY.settings.sampling)
    state = EMPTY._replace(tokens=EMPTY.tokens + 9)
    fields = np.ones((3, width), np.int32)
    fields[1] = 2
    new = InstallInputs(
        slots=jnp.array([3, 0, 5]),  # the last one is for nobody
        starts=jnp.array([2, 30, 0]),
        num_tokens=jnp.array([4, 3, 0]),
        settings=jnp.asarray(fields),
        page_table=jnp.array([[4, 5, 6], [7, 0, 0], [8, 8, 8]]),
        tokens=jnp.arange(100, 110),
    )
    after = install(state, new)
    expected = np.full((5, 40), 9)
    expected[3, 2:6] = [100, 101, 102, 103]
    expected[0, 30:33] = [104, 105, 106]
    np.testing.assert_array_equal(after.tokens, expected)
    np.testing.assert_array_equal(
        after.page_table, [[7, 0, 0], [0, 0, 0], [0, 0, 0], [4, 5, 6], [0, 0, 0]]
    )
    before, sampling = state.settings.sampling, after.settings.sampling
    np.testing.assert_array_equal(sampling.top_k[jnp.array([0, 3])], [2, 1])
    assert sampling.top_k[1] == before.top_k[1]


class Table(Echo):
    """A model whose hidden state goes by the token alone, and whose logits are a product."""

    def __init__(self, rng: np.random.Generator) -> None:
        noise = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        self.table, self.head = noise(50, 64), nnx.Param(noise(264, 64))

    def __call__(self, batch: Any, cache: Any, kernels: Any = None, taps: Any = None) -> Any:
        return self.table[batch.tokens], cache

    def logits(self, hidden: Any) -> Any:
        return project(hidden, self.head)


@pytest.mark.parametrize("top", [0, 1, 8])
def test_the_positions_that_tell_are_told_the_same_with_a_kernel(
    rng: np.random.Generator, top: int
) -> None:
    tokens = EMPTY.tokens.at[:, :].set(jnp.asarray(rng.integers(0, 50, EMPTY.tokens.shape)))
    sampling = EMPTY.settings.sampling
    sampling = sampling._replace(
        prompt_lens=sampling.prompt_lens.at[:3].set(jnp.array([12, 30, 9]))
    )
    state = EMPTY._replace(tokens=tokens, settings=EMPTY.settings._replace(sampling=sampling))
    cache = (jnp.zeros((9, 2, 1, 16, 2)),)
    rows = np.array(
        [
            [0, 2, 10, 0, 0, 0, 5],  # the rest of a prompt, told from the middle on
            [1, 4, 16, 0, 0, 0, 0],  # a chunk of a longer one, of which all is told
            [2, 8, 1, 0, 1, 0, 0],  # the end of a prompt, behind which no token is known
            [3, 20, 8, 0, 1, 0, NOBODY_ASKS],
            [4, 0, 0, 0, 0, 0, 0],  # padding
        ],
        np.int32,
    )
    tells = np.zeros(128, bool)
    tells[3:9] = tells[10:26] = True  # of the first, the last token tells of nothing
    told, found = [], Options(Asked(Wanted(top, 0, True), jnp.zeros((5, 0), jnp.int32), True))
    model = Table(rng)
    for kernels in (XLA, Kernels(hopper_products=True, interpret=True)):
        *_, outputs = programs.extend(
            model,
            cache,
            state,
            jnp.asarray(rows),
            num_tokens=128,
            options=found._replace(kernels=kernels),
        )
        told.append([np.asarray(each)[tells] for each in outputs.of_inputs or ()])
    assert told[0][0].shape == (22,) and told[0][1].shape == (22, top)
    for reference, got in zip(*told, strict=True):
        np.testing.assert_allclose(got, reference, atol=1e-4)


def test_what_is_in_the_cache_is_not_written_again() -> None:
    fields = dict(
        positions=[6, 7, 8, 0, 0],
        rows=[0, 0, 0, 1, 2],  # the last is padding
        query_lens=[3, 1],
        kv_lens=[9, 1],
        prompt_lens=[9, 1],
        page_table=[[5, 3, 4], [2, 0, 0]],
        write_starts=[8, 0],
    )
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in fields.items()}
    batch = Batch(tokens=jnp.zeros(5, jnp.int32), query_starts=jnp.array([0, 3]), **arrays)
    written = write_pages(batch, num_pages=9, page_size=4).tolist()
    assert written == [9, 10, 4, 2, 13], "ids that do not exist are distinct"
    everything = write_pages(batch._replace(write_starts=None), num_pages=9, page_size=4)
    assert everything.tolist() == [3, 3, 4, 2, 13]
