"""On a GPU: the engine's tokens are the CPU's, the embedded model speaks, logits are as near with
kernels as without, and a model of real size runs."""

import random
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import compile_ahead
from encoders import MEAN, save_encoder
from engines import check_books
from flax import nnx
from naive import naive_greedy
from numerics import assert_near_exact
from test_functions import REGISTERED, Force
from test_structured_output import FORMS, fits
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
        [rng.randrange(3, 320) for _ in range(rng.choice([1, 5, 16, 40, 64, 150]))]
        for _ in range(20)
    ]
    prompts += prompts[:12]  # whole pages of which are read once
    with jax.default_device(jax.devices("cpu")[0]):
        naive = naive_greedy(tmp_path, 256)
        expected = [naive(prompt, 12) for prompt in prompts]
    arguments = dict(model_path=str(tmp_path), skip_tokenizer_init=True, show_progress=False)
    with Engine(**arguments, **SMALL) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=greedy(12))
        assert [result["output_ids"] for result in results] == expected
        assert engine.get_server_info()["num_compilations_since_start"] == 0


def test_log_probabilities_are_those_of_the_cpu(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_config("qwen3"), seed=1)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in (1, 5, 40, 150)]
    asked: dict[str, Any] = dict(
        input_ids=prompts,
        sampling_params=greedy(8),
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
        token_ids_logprob=[5, 7],
    )
    told = []
    sizes: dict[str, Any] = SMALL | dict(skip_tokenizer_init=True, show_progress=False)
    for device in ("cpu", "cuda"):
        with Engine(model_path=str(tmp_path), device=device, **sizes) as engine:
            told.append([result["meta_info"] for result in engine.generate(**asked)])
    for right, got in zip(*told, strict=True):
        for side in ("input", "output"):
            for kind in ("token", "top", "token_ids"):
                name = f"{side}_{kind}_logprobs"
                expected, numbers = (_flat(info[name]) for info in (right, got))
                np.testing.assert_allclose(numbers, expected, atol=1e-3, err_msg=name)


def test_functions_and_hidden_states_are_those_of_the_cpu(tmp_path: Path) -> None:
    """A processor with a state, a steering vector, NumPy in between, and the states themselves."""
    save_checkpoint(tmp_path, tiny_config("qwen3"), seed=1)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in (1, 5, 40, 150)]
    vector = np.random.default_rng(0).standard_normal(64).tolist()
    params = [
        greedy(20),
        greedy(20) | {"logits_processors": "count", "custom_params": {"first": 50}},
        greedy(20) | {"interventions": "steer_mlp", "custom_params": {"vector": vector}},
        greedy(20) | {"custom_params": {"token": 100}},
    ]
    asked: dict[str, Any] = dict(
        input_ids=prompts,
        sampling_params=params,
        custom_logit_processor=[None, None, None, Force()],
    )
    states: dict[str, Any] = dict(return_hidden_states={"layers": [0, 1, -1, "mlp_output.1"]})
    sizes: dict[str, Any] = SMALL | dict(skip_tokenizer_init=True, show_progress=False) | REGISTERED
    told = []
    for device in ("cpu", "cuda"):
        with Engine(model_path=str(tmp_path), device=device, **sizes) as engine:
            forced = engine.generate(**asked)
            asked_states = dict(input_ids=prompts, sampling_params=params[:3] + [greedy(20)])
            told.append((forced, engine.generate(**asked_states, **states)))
    for right, got in zip(*told, strict=True):
        for one, other in zip(right, got, strict=True):
            assert one["output_ids"] == other["output_ids"]
    assert told[1][0][1]["output_ids"] == list(range(50, 70))
    assert told[1][0][3]["output_ids"] == list(range(100, 120))
    for one, other in zip(told[0][1], told[1][1], strict=True):
        expected, got = one["meta_info"]["hidden_states"], other["meta_info"]["hidden_states"]
        for place in expected.places:
            np.testing.assert_allclose(got.array(place), expected.array(place), atol=2e-3)


def test_completions_of_a_form() -> None:
    with Engine(
        show_progress=False, constrained_json_disable_any_whitespace=True, **SMALL
    ) as engine:
        check_books(engine)
        for field, form in FORMS.items():
            params = {"max_new_tokens": 200, "sampling_seed": 5, field: form}
            mixed = [params, {"max_new_tokens": 20}] * 8
            for result in engine.generate(["The import statement"] * 16, mixed)[::2]:
                assert fits(field, result["text"]), result["text"]


def test_tokens_without_a_choice_take_few_steps() -> None:
    """In steps that decode some rows and read what a grammar forces in others."""
    literal = '{"identifier": "none", "numbers": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "n": '
    regex = "[xy]" + re.escape(literal) + "[0-9]" + re.escape(literal) + "[a-z]"
    prompts = ["The import statement", "A dictionary is", "for", "A function definition"] * 4
    forced, plain = {"temperature": 0, "max_new_tokens": 200, "regex": regex}, greedy(40)
    outputs = []
    for device in ("cpu", "cuda"):
        with Engine(show_progress=False, device=device, **SMALL) as engine:
            check_books(engine)
            before = engine._loop.num_steps
            results = engine.generate(prompts, [forced, plain] * 8)
            assert all(re.fullmatch(regex, result["text"]) for result in results[::2])
            assert engine._loop.num_steps - before < len(results[0]["output_ids"])
            outputs.append([result["text"] for result in results])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("architecture", ["Qwen3", "BertModel", "RobertaModel"])
def test_embeddings_are_those_of_the_cpu(tmp_path: Path, architecture: str) -> None:
    if architecture == "Qwen3":
        save_checkpoint(tmp_path, tiny_config("qwen3"), seed=1)
    else:
        modules = MEAN["modules.json"]
        files = MEAN | {"modules.json": [modules[0], modules[1], modules[3]]}
        save_encoder(tmp_path, architecture, files)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(4, 290) for _ in range(rng.choice([1, 5, 40, 90]))] for _ in range(40)
    ]
    sizes: dict[str, Any] = SMALL | dict(skip_tokenizer_init=True, show_progress=False)
    found = []
    for device in ("cpu", "cuda"):
        with Engine(
            model_path=str(tmp_path), device=device, dtype="float32", is_embedding=True, **sizes
        ) as engine:
            found.append([result["embedding"] for result in engine.encode(prompts)])
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_memory_is_given_back_and_taken_again() -> None:
    in_use = lambda: jax.devices()[0].memory_stats()["bytes_in_use"]
    prompts = ["The import statement", "A dictionary is"]
    with Engine(
        show_progress=False, enable_weights_cpu_backup=True, max_total_tokens=1 << 16, **SMALL
    ) as engine:
        texts = [result["text"] for result in engine.generate(prompts, greedy(30))]
        usage = engine.get_server_info()["internal_states"][0]["memory_usage"]
        all_of_it = in_use()
        engine.release_memory_occupation(["kv_cache"])
        without_cache = in_use()
        engine.release_memory_occupation(["weights"])
        without_both = in_use()
        print("\n", usage, all_of_it, without_cache, without_both)
        assert all_of_it - without_cache > 0.95 * usage["kvcache"] * 2**30
        assert without_cache - without_both > 0.95 * usage["weight"] * 2**30
        engine.resume_memory_occupation()
        assert [result["text"] for result in engine.generate(prompts, greedy(30))] == texts
        assert in_use() < 1.02 * all_of_it


def _flat(entries: Any) -> list[Any]:
    """The logprobs of nested lists of entries."""
    if isinstance(entries, list):
        return [number for each in entries for number in _flat(each)]
    return [] if entries is None or entries[0] is None else [entries[0]]


def test_the_embedded_model_says_the_same_with_kernels_and_without() -> None:
    prompts = ["The import statement", "A dictionary is", "for", "A function definition"]
    texts = {}
    for backend in ("xla", None):
        with Engine(show_progress=False, attention_backend=backend, **SMALL) as engine:
            results = engine.generate(prompts * 4, greedy(60))
            texts[backend] = [result["text"] for result in results]
            if backend is None:
                streamed = list(engine.generate(prompts[0], greedy(60), stream=True))
    print("\n", texts[None][0])
    assert texts["xla"] == texts[None] == texts[None][:4] * 4
    assert len(set(texts[None])) == 4
    assert streamed[-1]["text"] == texts[None][0]


CONTEXTS = (1, 7, 64, 1000, 8000)
ALONE = [1, 3]  # of which few_row_linear takes the decoding
PAGE, PAGES_EACH = 64, 126


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2.5-0.5b", "llama-3.1-8b"])
def test_logits_with_every_kernel_are_as_near_as_without(shape: str) -> None:
    """Prompts of all lengths in one batch, then one token more of each, then that of few alone."""
    config = ModelConfig.from_dict(SHAPES[shape] | {"num_hidden_layers": 2, "vocab_size": 2048})
    logits = logits_of(config, kernels_for(config))
    names = [f"prompt of {n}" for n in CONTEXTS] + [f"one behind {n}" for n in CONTEXTS]
    names += [f"one behind {CONTEXTS[i]}, among few" for i in ALONE]
    for backend in ("mosaic", "triton"):
        rows = [f"{backend}: {name}" for name in names]
        exact = logits["exact"].astype(np.float64)
        assert_near_exact(logits[backend], exact, logits["naive"], rows=rows)


def kernels_for(config: ModelConfig) -> dict[str, tuple[str, Kernels]]:
    problem = Problem(
        capability=(9, 0),
        dtype="bfloat16",
        head_size=config.head_size,
        group_size=config.group_size,
        page_size=PAGE,
    )
    named = {name: ("bfloat16", choose(name, problem)) for name in ("mosaic", "triton")}
    return {"exact": ("float32", XLA), "naive": ("bfloat16", XLA)} | named


def logits_of(config: ModelConfig, kinds: dict[str, tuple[str, Kernels]]) -> dict[str, np.ndarray]:
    """[rows V] of each kind, of the last token of each row of each step."""
    graph, state = nnx.split(build(config, dtype="bfloat16"))  # the same weights in either dtype
    leaves, tree = jax.tree.flatten(state)
    params = {t: [leaf.astype(t) for leaf in leaves] for t in ("bfloat16", "float32")}
    pages = (1 + PAGES_EACH * len(CONTEXTS), 2, config.num_kv_heads, PAGE, config.head_size)
    caches = {t: (jnp.full(pages, jnp.nan, t),) * config.num_layers for t in params}
    steps = steps_of(config.vocab_size)

    def calling(kernels: Kernels) -> Any:
        def run(leaves, batch, last, cache):
            model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            hidden, cache = model(batch, cache, kernels)
            return model.logits(hidden[last]), cache

        return run

    with jax.default_matmul_precision("highest"):
        compiled = compile_ahead(
            {
                (kind, i): (calling(kernels), (params[dtype], *step, caches[dtype]))
                for kind, (dtype, kernels) in kinds.items()
                for i, step in enumerate(steps)
            }
        )
    logits = {}
    for kind, (dtype, _) in kinds.items():
        cache, rows = caches[dtype], []
        for i, step in enumerate(steps):
            out, cache = compiled[kind, i].result()(params[dtype], *step, cache)
            rows.append(np.asarray(out))
        logits[kind] = np.concatenate(rows)
    return logits


def steps_of(vocab_size: int) -> list[tuple[Batch, np.ndarray]]:
    """Batches, and which token of each is the last of its row. The last two do the same."""
    rng, lengths = np.random.default_rng(0), np.array(CONTEXTS)
    B, num_tokens = len(lengths), -(-sum(CONTEXTS) // 128) * 128
    page_table = np.zeros((B, PAGES_EACH + 8), np.int32)
    page_table[:, :PAGES_EACH] = 1 + rng.permutation(B * PAGES_EACH).reshape(B, -1)
    tokens = rng.integers(0, vocab_size, (2, num_tokens))
    rows = np.repeat(np.arange(B + 1), [*lengths, num_tokens - lengths.sum()])
    starts = np.cumsum(lengths) - lengths
    positions = np.where(rows < B, np.arange(num_tokens) - np.append(starts, 0)[rows], 0)
    prefill = dict(
        tokens=tokens[0],
        positions=positions,
        rows=rows,
        query_starts=starts,
        query_lens=lengths,
        kv_lens=lengths,
        prompt_lens=lengths,
        page_table=page_table,
    )

    def decode(some: Any) -> dict[str, Any]:
        return dict(
            tokens=tokens[1, some],
            positions=lengths[some],
            rows=np.arange(len(some)),
            query_starts=None,
            query_lens=np.ones(len(some)),
            kv_lens=lengths[some] + 1,
            prompt_lens=lengths[some],
            page_table=page_table[some],
        )

    lasts = starts + lengths - 1, np.arange(B), np.arange(len(ALONE))
    every = np.arange(8) % B  # as many as small_batch_linear takes; some twice, which is the same
    batches = prefill, decode(every), decode(np.array(ALONE))
    return [
        jax.tree.map(lambda field: jnp.asarray(field, jnp.int32), (Batch(**batch), last))
        for batch, last in zip(batches, lasts, strict=True)
    ]


def test_a_model_of_real_size_runs() -> None:
    rng = np.random.default_rng(0)
    with Engine(
        model_path="llama-3.1-8b",
        load_format="dummy",
        skip_tokenizer_init=True,
        context_length=8192,
        max_running_requests=32,
        cuda_graph_bs=[1, 32],
        chunked_prefill_size=1024,
        show_progress=False,
    ) as engine:
        info = engine.get_server_info()
        print("\n", info["startup_time"], info["internal_states"][0])
        for count, length, new, sampling in (
            (1, 128, 33, {"temperature": 0}),
            (32, 1024, 20, {"temperature": 0}),
            (64, 100, 50, {"temperature": 0.8, "top_p": 0.95}),
        ):
            ids = rng.integers(0, 100_000, (count, length)).tolist()
            sampling = {"max_new_tokens": new, "ignore_eos": True} | sampling
            results = engine.generate(input_ids=ids, sampling_params=sampling)
            assert [len(result["output_ids"]) for result in results] == [new] * count
        seeded = {"max_new_tokens": 16, "sampling_seed": 7, "ignore_eos": True}
        same = engine.generate(input_ids=[[1, 2, 3, 4]] * 3, sampling_params=seeded)
        assert len({tuple(result["output_ids"]) for result in same}) == 1
        assert engine.get_server_info()["num_compilations_since_start"] == 0
