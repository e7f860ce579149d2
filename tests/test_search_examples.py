"""The examples that search for good texts by calling an engine: beam search, best of n."""

import itertools
from typing import Any

import numpy as np
import pytest
from engines import CUT_MODEL
from numerics import softmax_exact
from oracle import causal_model
from samplers import beam_search, best_of_n

from jaxengine import Engine

PROMPT = "The import statement"


class Markov:
    """An engine whose model knows the last token and how many there are."""

    def __init__(self, probs: np.ndarray):
        self.logprobs = np.log(probs)

    def generate(self, *, input_ids, sampling_params, return_logprob, top_logprobs_num) -> Any:
        assert return_logprob and sampling_params == {"max_new_tokens": 1, "temperature": 0}
        return [
            self.result(self.logprobs[len(ids), ids[-1]], top_logprobs_num) for ids in input_ids
        ]

    def result(self, logprobs: np.ndarray, count: int) -> dict[str, Any]:
        top = np.argsort(-logprobs)[:count]
        entries = [(float(logprobs[token]), int(token), None) for token in top]
        return {"meta_info": {"output_top_logprobs": [entries]}}

    def all_texts(self, length: int, stop: int | None) -> dict[tuple[int, ...], float]:
        """Every text behind token 1 that `stop` ends or that has so many tokens, and its
        log-probability."""
        texts: dict[tuple[int, ...], float] = {}
        for tokens in itertools.product(range(self.logprobs.shape[1]), repeat=length):
            if stop in tokens:
                tokens = tokens[: tokens.index(stop) + 1]
            pairs = enumerate(itertools.pairwise((1, *tokens)), start=1)
            texts[tokens] = float(sum(self.logprobs[n, *pair] for n, pair in pairs))
        return texts


@pytest.mark.parametrize("stop", [None, 2])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(stop, length_penalty, rng) -> None:
    V, length = 4, 4
    engine: Any = Markov(softmax_exact(rng.standard_normal((length + 1, V, V)) * 2))
    texts = engine.all_texts(length, stop)
    exact = sorted(((lp / len(t) ** length_penalty, t) for t, lp in texts.items()), reverse=True)
    beams = beam_search.beam_search(
        engine,
        [1],
        num_beams=V**length,
        max_new_tokens=length,
        stop_token_ids=[] if stop is None else [stop],
        length_penalty=length_penalty,
    )
    assert [beam.tokens for beam in beams[:9]] == [tokens for _, tokens in exact[:9]]
    scores = [beam.score(length_penalty) for beam in beams]
    np.testing.assert_allclose(scores, [score for score, _ in exact])


def test_one_beam_is_greedy_and_two_look_further() -> None:
    probs = np.full((3, 4, 4), 0.25)
    probs[1, 0] = 0.02, 0.5, 0.46, 0.02
    probs[2, 2] = 0.01, 0.01, 0.01, 0.97
    engine: Any = Markov(probs)
    [greedy] = beam_search.beam_search(engine, [0], num_beams=1, max_new_tokens=2)
    assert greedy.tokens[0] == 1
    best, _ = beam_search.beam_search(engine, [0], num_beams=2, max_new_tokens=2)
    assert best.tokens == (2, 3) and best.logprob == pytest.approx(np.log(0.46 * 0.97))


def test_an_end_of_lower_rank_is_no_end_and_one_of_higher_rank_may_be_outdone() -> None:
    probs = np.full((3, 4, 4), 0.25)
    search = lambda **given: beam_search.beam_search(engine, [0], max_new_tokens=2, **given)[0]
    probs[1, 0] = 0.05, 0.5, 0.4, 0.05  # greedy decoding takes 1, though 2 would end it
    engine: Any = Markov(probs)
    assert search(num_beams=1, stop_token_ids=[2], length_penalty=0).tokens[0] == 1
    assert search(num_beams=2, stop_token_ids=[2], length_penalty=0).tokens == (2,)
    probs[1, 0] = 0.05, 0.3, 0.6, 0.05
    probs[2, 1] = 0.01, 0.01, 0.01, 0.97
    engine = Markov(probs)
    for num_beams in (1, 2):
        size: Any = dict(num_beams=num_beams, stop_token_ids=[2])
        assert search(**size, length_penalty=1).tokens == (2,)
        assert search(**size, length_penalty=4).tokens == (1, 3)


def test_samples_are_ranked_by_their_mean_logprob() -> None:
    samples = [[-1.0, -1.0], [-0.5] * 9, [-4.0]]
    results = [
        {"meta_info": {"output_token_logprobs": [(logprob, 0, None) for logprob in sample]}}
        for sample in samples
    ]

    class Three:
        def generate(self, prompts, sampling_params, *, return_logprob):
            assert (prompts, return_logprob) == (["Hi"], True)
            assert sampling_params == {"temperature": 0.7, "n": 3}
            return results

    engine: Any = Three()
    ranked = best_of_n.best_of_n(engine, "Hi", 3, {"temperature": 0.7})
    assert ranked == [results[1], results[0], results[2]]


# Against transformers, and the engine's own scores


@pytest.fixture(scope="module")
def reference() -> Any:
    """The engine's model in transformers."""
    return causal_model(CUT_MODEL)


@pytest.mark.oracle
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_beams_are_those_of_transformers(
    text_engine: Engine, reference: Any, length_penalty: float
) -> None:
    import torch

    prompt_ids = text_engine.tokenizer.encode("A dictionary is")
    stops = [text_engine.tokenizer.encode(text)[0] for text in (" called", " work")]
    size: dict[str, Any] = dict(num_beams=4, max_new_tokens=10, length_penalty=length_penalty)
    theirs = reference.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        num_return_sequences=4,
        do_sample=False,
        early_stopping="never",
        eos_token_id=stops,
        pad_token_id=stops[0],
        output_scores=True,
        return_dict_in_generate=True,
        **size,
    )
    ours = beam_search.beam_search(text_engine, prompt_ids, stop_token_ids=stops, **size)
    assert {beam.tokens[-1] in stops for beam in ours} == {True, False}
    for beam, tokens in zip(ours, theirs.sequences[:, len(prompt_ids) :].tolist(), strict=True):
        assert beam.tokens == tuple(tokens[: len(beam.tokens)])
        assert set(tokens[len(beam.tokens) :]) <= {stops[0]}  # padding
    scores = [beam.score(length_penalty) for beam in ours]
    np.testing.assert_allclose(scores, theirs.sequences_scores, rtol=1e-4, atol=1e-5)


def test_the_best_sample_is_the_likeliest_a_token(text_engine: Engine) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 12, "sampling_seed": 3}
    ranked = best_of_n.best_of_n(text_engine, PROMPT, 6, params)
    prompt_ids = text_engine.tokenizer.encode(PROMPT)
    texts = [result["output_ids"] for result in ranked]
    likelihoods = text_engine.loglikelihood([prompt_ids] * 6, texts)
    means = [each.sum / len(text) for each, text in zip(likelihoods, texts, strict=True)]
    assert means == sorted(means, reverse=True) and means[0] > means[-1] + 0.1
