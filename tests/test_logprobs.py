"""Log-probabilities: those of transformers and of float64, however requests are cut,
batched, cached or sent back; the lists have SGLang's layout."""

import asyncio
import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import TINY, check_books
from oracle import causal_outputs
from tiny import save_checkpoint, tiny_config

from jaxengine import Engine
from jaxengine.report import write_report
from jaxengine.sampling import logprobs_by_blocks
from jaxengine.sampling import probabilities as library
from jaxengine.sampling.probabilities import block_size, largest

TOLERANCE = 1e-4
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
ALL: dict[str, Any] = dict(return_logprob=True, logprob_start_len=0, top_logprobs_num=3)


# The functions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("V", "k"), [(7, 7), (128, 3), (129, 129), (1000, 1), (5000, 64)])
def test_the_largest_are_found_without_sorting_all(rng, V, k):
    logits = rng.standard_normal((5, V)).astype(np.float32)
    logits[1, : V // 2] = -np.inf
    values, ids = (np.asarray(a) for a in jax.jit(largest, static_argnums=1)(logits, k))
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, axis=1), values)
    assert all(len(set(row)) == k for row, value in zip(ids, values, strict=True))


def test_equal_logits_are_told_once_each(rng):
    values, ids = largest(jnp.zeros((2, 300)), 200)
    assert not values.any() and all(len(set(row)) == 200 for row in np.asarray(ids).tolist())


def test_numbers_are_those_of_float64(rng):
    logits = (20 * rng.standard_normal((4, 900))).astype(np.float32)
    tokens, ids = rng.integers(0, 900, 4), rng.integers(0, 900, (4, 8))
    told = library.logprobs(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(ids), 5)
    exact = log_softmax(logits)
    np.testing.assert_allclose(told.of_token, exact[np.arange(4), tokens], atol=TOLERANCE)
    np.testing.assert_allclose(told.of_ids, np.take_along_axis(exact, ids, 1), atol=TOLERANCE)
    np.testing.assert_allclose(told.top, -np.sort(-exact, axis=1)[:, :5], atol=TOLERANCE)


@pytest.mark.parametrize(("num_ids", "num_top"), [(2, 3), (0, 0)])
def test_a_long_prompt_is_told_of_block_by_block(rng, monkeypatch, num_ids, num_top):
    T, V = 77, 300
    head = rng.standard_normal((16, V)).astype(np.float32)
    hidden = rng.standard_normal((T, 16)).astype(np.float32)
    tokens, ids = rng.integers(0, V, T), rng.integers(0, V, (T, num_ids))
    given = {"tokens": jnp.asarray(tokens), "ids": jnp.asarray(ids), "num_top": num_top}
    monkeypatch.setattr(library, "BLOCK_BYTES", 16 * 4 * V)
    assert block_size(V) == 16
    shapes = []

    def project(x):
        shapes.append(x.shape)
        return x @ head

    told = logprobs_by_blocks(jnp.asarray(hidden), project, **given)
    assert {shape[0] for shape in shapes[1:]} == {16}, "but for the abstract evaluation"
    exact = log_softmax(hidden @ head)
    np.testing.assert_allclose(told.of_token, exact[np.arange(T), tokens], atol=TOLERANCE)
    np.testing.assert_allclose(told.of_ids, np.take_along_axis(exact, ids, 1), atol=TOLERANCE)
    np.testing.assert_allclose(told.top, -np.sort(-exact, axis=1)[:, :num_top], atol=TOLERANCE)


def test_blocks_of_the_largest_vocabularies_stay_small():
    for V in (32_000, 152_064, 262_144):
        assert 8 <= block_size(V) and 4 * V * block_size(V) <= 160 << 20


# The engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logprobs")
    save_checkpoint(path, tiny_config("qwen3"), seed=3)
    return path


@pytest.fixture(scope="module")
def one_engine(folder: Path) -> Iterator[Engine]:
    with Engine(model_path=str(folder), **TINY) as engine:
        check_books(engine)
        yield engine


@pytest.fixture
def engine(one_engine: Engine) -> Engine:
    """For tests that need no other, with nothing cached."""
    assert one_engine.flush_cache().success
    return one_engine


@pytest.fixture(scope="module")
def exact(folder: Path):
    """Ids -> log-probabilities [tokens V] of the token behind each, by transformers."""
    outputs_of = causal_outputs(folder)
    return lambda ids: log_softmax(outputs_of(ids).logits[0].numpy())


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 299) for _ in range(length)] for length in lengths]


def numbers(entries: list[Any]) -> list[float]:
    return [logprob for logprob, *_ in entries]


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4])
def test_all_numbers_are_those_of_transformers(make_engine, folder, exact, steps):
    """Prompts of one token, shorter and longer than a chunk, all in one batch."""
    engine = make_engine(model_path=str(folder), num_continuous_decode_steps=steps)
    prompts, asked = prompts_of([1, 2, 17, 40, 5]), [7, 11]
    results = engine.generate(
        input_ids=prompts, sampling_params=GREEDY, token_ids_logprob=asked, **ALL
    )
    for prompt, result in zip(prompts, results, strict=True):
        info, ids = result["meta_info"], prompt + result["output_ids"]
        right, n = exact(ids), len(prompt)
        entries = info["input_token_logprobs"] + info["output_token_logprobs"]
        assert entries[0] == (None, prompt[0], None)
        assert [token for _, token, _ in entries] == ids
        told = right[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(numbers(entries[1:]), told, atol=TOLERANCE)
        tops = info["input_top_logprobs"] + info["output_top_logprobs"]
        of_ids = info["input_token_ids_logprobs"] + info["output_token_ids_logprobs"]
        assert tops[0] is None and of_ids[0] is None and len(tops) == len(of_ids) == len(ids)
        for row, top, of_id in zip(right, tops[1:], of_ids[1:], strict=False):
            np.testing.assert_allclose(numbers(top), -np.sort(-row)[:3], atol=TOLERANCE)
            np.testing.assert_allclose(row[[token for _, token, _ in top]], numbers(top), atol=1e-4)
            assert [token for _, token, _ in of_id] == asked
            np.testing.assert_allclose(numbers(of_id), row[asked], atol=TOLERANCE)
        assert result["output_ids"][0] == info["output_top_logprobs"][0][0][1], f"greedy, of {n}"


@pytest.mark.oracle
def test_outputs_tell_of_what_was_drawn_from_and_raw_ones_of_the_model(make_engine, folder, exact):
    [prompt] = prompts_of([9])
    how = {"temperature": 0.5, "sampling_seed": 1, "logit_bias": {"20": 4.0}, "max_new_tokens": 5}
    how |= {"ignore_eos": True, "top_k": 3}
    for mode in ("processed_logprobs", "raw_logprobs"):
        engine = make_engine(model_path=str(folder), logprobs_mode=mode)
        result = engine.generate(input_ids=prompt, sampling_params=how, return_logprob=True)
        right = exact(prompt + result["output_ids"])[len(prompt) - 1 : -1]
        if mode == "processed_logprobs":
            right[:, 20] += 4
            right = log_softmax(right / 0.5)
        told = numbers(result["meta_info"]["output_token_logprobs"])
        chosen = right[np.arange(5), result["output_ids"]]
        np.testing.assert_allclose(told, chosen, atol=TOLERANCE)


def test_numbers_do_not_depend_on_company_caches_or_retraction(make_engine):
    """A pool so small that requests are sent back, prompts that share beginnings, chunks of 16."""
    prompts = prompts_of([40, 33, 21, 48, 16, 5])
    prompts += [prompts[0][:24] + prompts[1][:9], prompts[0]]
    how = {"sampling_params": GREEDY | {"max_new_tokens": 24}, "token_ids_logprob": [3], **ALL}
    alone = [make_engine().generate(input_ids=p, **how) for p in prompts[:2]]
    engine = make_engine(max_running_requests=4, max_total_tokens=160, cuda_graph_bs=[4])
    for _ in range(2):
        together = engine.generate(input_ids=prompts, **how)
        retractions = sum(result["meta_info"]["total_retractions"] for result in together)
        for prompt, result in zip(prompts, together, strict=True):
            info = result["meta_info"]
            assert len(info["input_token_logprobs"]) == len(prompt)
            assert len(info["output_token_logprobs"]) == len(result["output_ids"]) == 24
        for one, among in zip(alone, together[:2], strict=True):
            assert one["output_ids"] == among["output_ids"]
            for name in ("input_token_logprobs", "output_token_logprobs"):
                expected, got = (numbers(r["meta_info"][name]) for r in (one, among))
                np.testing.assert_allclose(
                    np.array(got, float), np.array(expected, float), atol=TOLERANCE
                )
        twins = (together[0]["meta_info"], together[-1]["meta_info"])
        one, other = ([numbers(top) for top in info["input_top_logprobs"][1:]] for info in twins)
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
    assert retractions > 0, "the pool was to be too small"


def test_a_cached_beginning_is_used_as_far_as_nothing_is_asked_of_it(engine):
    [prompt] = prompts_of([40])
    ask = lambda **how: engine.generate(input_ids=prompt, sampling_params=GREEDY, **how)
    plain, cached = ask(), lambda **how: ask(**how)["meta_info"]["cached_tokens"]
    assert plain["meta_info"]["cached_tokens"] == 0 and "input_token_logprobs" not in plain
    assert cached(return_logprob=True) == 39
    assert cached(return_logprob=True, logprob_start_len=22) == 22
    assert cached(return_logprob=True, logprob_start_len=0) == 0
    assert ask(return_logprob=True)["output_ids"] == plain["output_ids"]


def test_entries_begin_where_they_are_wanted(engine):
    [prompt] = prompts_of([10])
    how: dict[str, Any] = dict(input_ids=prompt, sampling_params=GREEDY, return_logprob=True)
    whole = engine.generate(**how, logprob_start_len=0)["meta_info"]["input_token_logprobs"]
    for start, begin in ((-1, 9), (4, 4), (9, 9)):
        info = engine.generate(**how, logprob_start_len=start)["meta_info"]
        entries = info["input_token_logprobs"]
        assert entries[0] == (None, prompt[begin], None) and len(entries) == 10 - begin
        np.testing.assert_allclose(numbers(entries[1:]), numbers(whole[begin + 1 :]), atol=1e-5)
        assert "input_top_logprobs" not in info and "output_token_ids_logprobs" not in info


def test_a_prompt_that_is_not_continued_tells_what_would_come(engine, tmp_path):
    prompts = prompts_of([5, 37])
    greedy = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    results = engine.generate(
        input_ids=prompts, sampling_params=GREEDY | {"max_new_tokens": 0}, **ALL
    )
    for expected, result in zip(greedy, results, strict=True):
        info = result["meta_info"]
        assert result["output_ids"] == [] and info["completion_tokens"] == 0
        [(logprob, token, _)], [top] = info["output_token_logprobs"], info["output_top_logprobs"]
        assert token == expected["output_ids"][0] == top[0][1] and logprob == top[0][0]
    page = write_report(tmp_path / "scores.html", results).read_text()
    assert page.count('id="result-') == 2


def test_each_prompt_of_a_call_may_ask_for_its_own(engine):
    prompts = prompts_of([6, 7, 8])
    results = engine.generate(
        input_ids=prompts,
        sampling_params=GREEDY,
        return_logprob=[True, False, True],
        logprob_start_len=[0, 0, 5],
        top_logprobs_num=[0, 0, 9],
        token_ids_logprob=[[1, 2, 3], None, None],
    )
    infos = [result["meta_info"] for result in results]
    assert not any("logprobs" in name for name in infos[1])
    assert len(infos[0]["input_token_logprobs"]) == 6 and len(infos[2]["input_top_logprobs"]) == 3
    assert [token for _, token, _ in infos[0]["output_token_ids_logprobs"][0]] == [1, 2, 3]
    assert "output_token_ids_logprobs" not in infos[2] and "input_top_logprobs" not in infos[0]
    assert [len(top) for top in infos[2]["output_top_logprobs"]] == [9] * 6


@pytest.mark.parametrize("deltas", [False, True])
def test_streams_carry_what_their_chunks_carry(make_engine, deltas):
    engine, [prompt] = make_engine(incremental_streaming_output=deltas), prompts_of([6])
    how: dict[str, Any] = dict(input_ids=prompt, sampling_params=GREEDY, **ALL)
    whole = engine.generate(**how)["meta_info"]
    chunks = list(engine.generate(**how, stream=True))
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    before = [0, *counts[:-1]]
    for name in ("output_token_logprobs", "output_top_logprobs"):
        parts = [chunk["meta_info"][name] for chunk in chunks]
        expected = [
            whole[name][a if deltas else 0 : b] for a, b in zip(before, counts, strict=True)
        ]
        assert parts == expected and counts[-1] == 6


def test_an_output_that_stops_early_has_an_entry_for_each_token_and_no_more(make_engine):
    engine, [prompt] = make_engine(num_continuous_decode_steps=4), prompts_of([6])
    tokens = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    stop = GREEDY | {"ignore_eos": False, "stop_token_ids": [tokens[2]], "max_new_tokens": 20}
    result = engine.generate(input_ids=prompt, sampling_params=stop, return_logprob=True)
    entries = result["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in entries] == result["output_ids"] == tokens[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logprob_start_len=6), "logprob_start_len: expected less than the prompt's 6 tokens"),
        (dict(logprob_start_len=-2), "logprob_start_len: expected -1 or more, got -2"),
        (dict(top_logprobs_num=-1), "top_logprobs_num: expected 0 or more"),
        (dict(top_logprobs_num=100_000), "top_logprobs_num: expected at most 320"),
        (
            dict(token_ids_logprob=[1, 320]),
            "token_ids_logprob: expected ids from 0 to 319, got 320",
        ),
        (dict(token_ids_logprob="yes"), "token_ids_logprob: expected a list of token ids"),
        (dict(token_ids_logprob=[[1], [2]]), "token_ids_logprob: expected a list of token ids"),
        (dict(top_logprobs_num=[1, 2]), "top_logprobs_num: expected int, or a list of 1"),
        (dict(return_logprob="yes"), "return_logprob: expected bool, or a list of 1"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_refused(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(input_ids=[1, 2, 3, 4, 5, 6], **{"return_logprob": True} | arguments)
    assert engine._loop.num_live == 0


# Scores


@pytest.mark.oracle
def test_scores_are_probabilities_of_labels(engine, exact):
    [query, *items] = prompts_of([20, 3, 1, 5])
    labels = [5, 9, 250]
    right = np.exp([exact(query + item)[-1][labels] for item in items])
    scores = engine.score(query, items, labels)
    np.testing.assert_allclose(scores, right, rtol=1e-3)
    assert scores.scores == scores and scores.prompt_tokens == 69 and scores.token_logprobs is None
    shares = engine.score(query, items, labels, apply_softmax=True)
    np.testing.assert_allclose(shares, right / right.sum(axis=1, keepdims=True), rtol=1e-3)
    turned = engine.score(query, items, labels, item_first=True)
    right = np.exp([exact(item + query)[-1][labels] for item in items])
    np.testing.assert_allclose(turned, right, rtol=1e-3)
    hot = engine.score(query, items, labels, temperature=2.0, return_token_logprobs=True)
    whole = [exact(query + item) for item in items]
    np.testing.assert_allclose(
        hot, np.exp([log_softmax(row[-1] / 2)[labels] for row in whole]), rtol=1e-3
    )
    told = hot.token_logprobs[0][1:]
    ids = query + items[0]
    np.testing.assert_allclose(told, whole[0][np.arange(22), ids[1:]], atol=TOLERANCE)
    each = engine.score(query, items, [[5], [9], [250]])
    assert [len(row) for row in each] == [1, 1, 1]


@pytest.mark.oracle
def test_likelihoods_and_perplexities_are_those_of_transformers(engine, exact):
    [context, *others] = prompts_of([30, 4, 1, 9])
    [follow] = [engine.generate(input_ids=context, sampling_params=GREEDY)["output_ids"]]
    found = engine.loglikelihood([context] * 4, [*others, follow])
    for likelihood, continuation in zip(found, [*others, follow], strict=True):
        ids = context + continuation
        right = exact(ids)[np.arange(29, len(ids) - 1), continuation].sum()
        assert likelihood.sum == pytest.approx(right, abs=1e-3)
        assert likelihood.is_greedy is (continuation is follow)
    assert engine.loglikelihood(context, follow) == pytest.approx(found[-1], abs=1e-4)
    mean = exact(context)[np.arange(29), context[1:]].mean()
    assert engine.perplexity(context) == pytest.approx(np.exp(-mean), rel=1e-4)
    assert engine.perplexity([context, others[0]])[0] == pytest.approx(np.exp(-mean), rel=1e-4)


def test_text_is_scored_as_text(text_engine):
    whole = text_engine.perplexity("The import statement binds names")
    assert 1 < whole < text_engine.perplexity("names binds statement import The")
    good, bad = text_engine.loglikelihood(["The import"] * 2, [" statement", " dictionary"])
    assert good.sum > bad.sum and good.is_greedy and not bad.is_greedy
    label = text_engine.tokenizer.encode(" statement")[:1]
    [[likely], [unlikely]] = text_engine.score("The", [" import", " a"], label)
    assert 0 <= unlikely < likely <= 1


def test_scores_for_coroutines(engine):
    question = ([1, 2], [[3], [4]], [5, 6])
    assert asyncio.run(engine.async_score(*question)) == engine.score(*question)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.score("a", [[1]], [1]), "items: expected text, as the query is"),
        (lambda e: e.score([1], ["a"], [1]), "query, items: expected a text and a list of texts"),
        (lambda e: e.score([1], [[2]], None), "label_token_ids: expected token ids"),
        (lambda e: e.score([1], [[2]], 5), "label_token_ids: expected token ids, or for each item"),
        (lambda e: e.score([1], [[2]], [[1], [2]]), "label_token_ids: expected 1 lists"),
        (lambda e: e.score([1], [[2]], [5000]), "token_ids_logprob: expected ids from 0 to 319"),
        (lambda e: e.loglikelihood([[1]], [[]]), "context, continuation: expected some tokens"),
        (lambda e: e.loglikelihood([[1]], [[2], [3]]), "continuation: expected 1, one a context"),
        (lambda e: e.perplexity([1]), "prompt 0: expected at least two tokens"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(engine, call, message):
    with pytest.raises(ValueError, match=message):
        call(engine)


def test_of_nothing_there_is_nothing(engine):
    assert engine.perplexity([]) == engine.loglikelihood([], []) == []
    assert engine.score([1], [], [2]) == []


def test_a_step_that_tells_nothing_has_no_part_of_it(make_engine):
    engine = make_engine()
    steps = engine._loop.runner._programs
    bucket = next(iter(engine._loop.runner._steps))
    lowered = steps.lower_step(bucket, 8)
    assert len(jax.tree.leaves(lowered.out_info)) == len(jax.tree.leaves(steps.cache_shapes(8))) + 3
    assert "reduce_log" not in lowered.as_text() and not engine._loop.runner.variants._compiled
    assert inspect.signature(engine.generate).parameters["return_logprob"].default is None
