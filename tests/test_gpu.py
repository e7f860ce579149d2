"""On a GPU: the engine's tokens are the CPU's, the embedded model speaks, and models of real size
run, with their numbers printed (`make test-gpu`)."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive import naive_greedy
from numerics import assert_near_exact
from tiny import save_checkpoint, tiny_config

from jaxengine import Engine
from jaxengine.models import build
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import Batch
from jaxengine.models.shapes import SHAPES
from jaxengine.pallas_kernels.dispatch import XLA, Kernels, Problem, choose

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SMALL: dict[str, Any] = dict(
    page_size=16, max_running_requests=16, chunked_prefill_size=128, cuda_graph_bs=[16]
)


def greedy(count: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen3", {}), ("mistral", {"sliding_window": 9}), ("llama", {"rope": "llama3"})],
    ids=["qwen3", "sliding window", "llama3 rope"],
)
def test_float32_tokens_equal_the_naive_loop_on_the_cpu(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path, tiny_config(family, **overrides), seed=1)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(3, 320) for _ in range(rng.choice([1, 5, 40, 150]))] for _ in range(24)
    ]
    with jax.default_device(jax.devices("cpu")[0]):
        naive = naive_greedy(tmp_path, 256)
        expected = [naive(prompt, 20) for prompt in prompts]
    arguments = dict(model_path=str(tmp_path), skip_tokenizer_init=True, show_progress=False)
    with Engine(**arguments, **SMALL) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=greedy(20))
        assert [result["output_ids"] for result in results] == expected
        assert engine.get_server_info()["num_compilations_since_start"] == 0


def test_the_embedded_model_speaks_in_bfloat16() -> None:
    with Engine(show_progress=False, **SMALL) as engine:
        prompts = ["The import statement", "A dictionary is"] * 8
        texts = [result["text"] for result in engine.generate(prompts, greedy(40))]
        print("\n", texts[0])
        assert len(set(texts)) == 2
        streamed = list(engine.generate(prompts[0], greedy(40), stream=True))
        assert streamed[-1]["text"] == texts[0]


def test_the_embedded_model_says_the_same_with_kernels_and_without() -> None:
    prompts = ["The import statement", "A dictionary is", "for", "A function definition"] * 6
    texts = []
    for backend in ("xla", None):
        with Engine(show_progress=False, attention_backend=backend, **SMALL) as engine:
            texts.append([result["text"] for result in engine.generate(prompts, greedy(60))])
    assert texts[0] == texts[1]


CONTEXTS = (1, 7, 64, 1000, 8000)


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2.5-0.5b", "llama-3.1-8b"])
def test_logits_with_every_kernel_are_as_near_as_without(shape: str, backend: str) -> None:
    """Prompts of all lengths in one batch, then one token more of each."""
    config = ModelConfig.from_dict(SHAPES[shape] | {"num_hidden_layers": 3, "vocab_size": 8192})
    problem = Problem(
        capability=(9, 0),
        dtype="bfloat16",
        head_size=config.head_size,
        group_size=config.group_size,
        page_size=64,
    )
    exact, naive, got = (
        prefill_and_decode(config, dtype, kernels)
        for dtype, kernels in (
            ("float32", XLA),
            ("bfloat16", XLA),
            ("bfloat16", choose(backend, problem)),
        )
    )
    assert_near_exact(got, exact.astype(np.float64), naive)


def prefill_and_decode(config: ModelConfig, dtype: str, kernels: Kernels) -> np.ndarray:
    """Logits [2 B V] of the last token of each prompt and of one behind it."""
    graph, state = nnx.split(build(config, dtype="bfloat16"))  # the same weights in either dtype
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    lengths = np.array(CONTEXTS)
    page_table = np.zeros((len(lengths), 8192 // 64), np.int32)
    page_table[:, :126] = 1 + np.random.default_rng(0).permutation(126 * len(lengths)).reshape(
        -1, 126
    )
    num_tokens = -(-lengths.sum() // 128) * 128
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, num_tokens))
    rows = np.repeat(np.arange(len(lengths) + 1), [*lengths, num_tokens - lengths.sum()])
    starts = np.cumsum(lengths) - lengths
    positions = np.where(rows < len(lengths), np.arange(num_tokens) - np.append(starts, 0)[rows], 0)
    prefill = dict(
        tokens=tokens[0], positions=positions, rows=rows, query_starts=starts, query_lens=lengths
    )
    decode = dict(
        tokens=tokens[1, : len(lengths)],
        positions=lengths,
        rows=np.arange(len(lengths)),
        query_starts=None,
        query_lens=np.ones_like(lengths),
    )
    shape = (640, 2, config.num_kv_heads, 64, config.head_size)
    cache = tuple(jnp.full(shape, jnp.nan, dtype) for _ in range(config.num_layers))

    @jax.jit
    def run(leaves, batch, cache, last):
        model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        hidden, cache = model(batch, cache, kernels)
        return model.logits(hidden[last]), cache

    logits = []
    with jax.default_matmul_precision("highest"):
        for fields, kv_lens, last in (
            (prefill, lengths, starts + lengths - 1),
            (decode, lengths + 1, np.arange(len(lengths))),
        ):
            fields |= dict(kv_lens=kv_lens, prompt_lens=lengths, page_table=page_table)
            batch = Batch(**jax.tree.map(lambda field: jnp.asarray(field, jnp.int32), fields))
            out, cache = run(leaves, batch, cache, jnp.asarray(last))
            logits.append(np.asarray(out))
    return np.stack(logits)


@pytest.fixture(scope="module", params=["qwen2.5-0.5b", "llama-3.1-8b"])
def sized_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    started = time.perf_counter()
    engine = Engine(
        model_path=request.param,
        load_format="dummy",
        skip_tokenizer_init=True,
        context_length=8192,
        max_running_requests=128,
        cuda_graph_bs=[1, 32, 128],
        chunked_prefill_size=4096,
        show_progress=False,
    )
    seconds = {name: round(s, 1) for name, s in engine.get_server_info()["startup_time"].items()}
    print(f"\n{request.param}: started in {time.perf_counter() - started:.1f} s, {seconds}")
    yield engine
    engine.shutdown()


def test_models_of_real_size_run(sized_engine: Engine) -> None:
    info = sized_engine.get_server_info()
    print(f"{info['max_total_num_tokens']} tokens of KV cache", info["internal_states"][0])
    rng = np.random.default_rng(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(0, 100_000, (count, length)).tolist()

    def timed(count: int, length: int, new: int, **params: Any) -> float:
        ids = prompts(count, length)
        started = time.perf_counter()
        sampling = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0} | params
        results = sized_engine.generate(input_ids=ids, sampling_params=sampling)
        assert [len(result["output_ids"]) for result in results] == [new] * count
        return time.perf_counter() - started

    timed(2, 100, 4)
    single = (timed(1, 128, 129) - timed(1, 128, 1)) / 128
    prefill = timed(32, 1024, 1)
    step = (timed(32, 1024, 65) - prefill) / 64
    sampled = timed(128, 100, 100, temperature=0.8, top_p=0.95)
    print(f"single {single * 1e3:.2f} ms a token; step-32 {step * 1e3:.2f} ms; ", end="")
    print(f"prefill-32 {32 * 1024 / prefill:.0f} tok/s; ", end="")
    print(f"128 sampled at top_p 0.95: {128 * 100 / sampled:.0f} tok/s")
    seeded = {"max_new_tokens": 16, "sampling_seed": 7, "ignore_eos": True}
    same = sized_engine.generate(input_ids=[[1, 2, 3, 4]] * 3, sampling_params=seeded)
    assert len({tuple(result["output_ids"]) for result in same}) == 1
    assert sized_engine.get_server_info()["num_compilations_since_start"] == 0
