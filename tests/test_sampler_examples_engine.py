"""The samplers of `examples/samplers` registered with one engine, on the embedded model."""

import itertools
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from engines import CUT_MODEL, SMALL, check_books
from numerics import softmax_exact
from oracle import causal_outputs
from samplers import (
    classifier_free_guidance,
    contrastive,
    dry,
    entropy_temperature,
    eta,
    min_p,
    mirostat,
    typical,
    watermark,
    xtc,
)
from test_sampler_examples import eta_exact, typical_exact

import jaxengine
from jaxengine import Engine

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = ["The import statement", "A dictionary is", "In Python, a list", "The file object"]
FREE = {"temperature": 1.0, "max_new_tokens": 24, "sampling_seed": 7, "ignore_eos": True}
GREEDY = FREE | {"temperature": 0}
BREAKER = 201  # a newline
BIGRAMS = np.random.default_rng(0).normal(0, 2, (64, 4096)).astype(np.float32)
"""Logits of an amateur, by the last token modulo 64."""


def amateur(tokens: Any, length: Any) -> Any:
    return jnp.asarray(BIGRAMS)[tokens[length - 1] % 64]


PROCESSORS = {
    "dry": dry.processor([BREAKER]),
    "watermark": watermark.PROCESSOR,
    "contrastive": contrastive.processor(amateur),
    "classifier_free_guidance": classifier_free_guidance.PROCESSOR,
    "entropy_temperature": entropy_temperature.PROCESSOR,
    "min_p": min_p.PROCESSOR,
    "typical": typical.PROCESSOR,
    "eta": eta.PROCESSOR,
    "xtc": xtc.PROCESSOR,
    "mirostat": mirostat.PROCESSOR,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(**SMALL, logits_processors=PROCESSORS) as engine:
        check_books(engine)
        yield engine
        assert engine._loop.error is None


@pytest.fixture(scope="module")
def reference() -> Any:
    """Logits [T V] of the engine's model in transformers, float64."""
    outputs_of = causal_outputs(CUT_MODEL)
    return lambda tokens: outputs_of(tokens).logits[0].double().numpy()


def with_(name: str, sampling: dict[str, Any], **custom: Any) -> dict[str, Any]:
    return sampling | {"logits_processors": [name], "custom_params": custom}


def ids(engine: Engine, sampling: Any, prompts: Any = PROMPTS[0]) -> Any:
    results = engine.generate(prompts, sampling)
    if isinstance(results, dict):
        return results["output_ids"]
    return [result["output_ids"] for result in results]


def next_probs(
    engine: Engine, reference: Any, prompt: str, text: list[int], temperature: float = 1.0
) -> np.ndarray:
    """[n V]: the distributions before each token of a text."""
    tokens = engine.tokenizer.encode(prompt)
    return softmax_exact(reference(tokens + text)[len(tokens) - 1 : -1] / temperature)


def num_compiled(engine: Engine) -> int:
    return engine.get_server_info()["num_compilations_since_start"]


SAME = {
    "min_p": dict(min_p=0.0),
    "typical": dict(mass=1.0),
    "eta": dict(epsilon=1e-30),
    "xtc": dict(probability=0.0),
    "mirostat": dict(tau=1e6),
    "dry": dict(multiplier=0.0),
    "watermark": dict(delta=0.0),
    "entropy_temperature": dict(theta=0.0),
}
"""Parameters with which a processor changes no draw."""

OTHER = {
    "min_p": dict(min_p=1.0),
    "typical": dict(mass=1e-3),
    "eta": dict(epsilon=0.9),
    "xtc": dict(probability=1.0, threshold=0.01),
    "mirostat": dict(tau=0.0),
    "dry": dict(multiplier=1e3, allowed_length=1),
    "watermark": dict(delta=1e3),
    "entropy_temperature": dict(theta=1e3),
}
"""And some with which it does."""


@pytest.mark.parametrize("name", SAME)
def test_parameters_change_the_output_and_compile_nothing(engine: Engine, name: str) -> None:
    sampling, prompt = FREE | {"temperature": 0.5}, "spam, spam, spam, spam,"
    plain = ids(engine, sampling, prompt)
    assert ids(engine, with_(name, sampling, **SAME[name]), prompt) == plain
    other = ids(engine, with_(name, sampling, **OTHER[name]), prompt)
    assert other != plain and len(other) == len(plain)
    assert num_compiled(engine) == 0


def test_neighbours_in_a_batch_change_nothing_of_each_other(engine: Engine) -> None:
    greedy = ids(engine, GREEDY, PROMPTS)
    names = list(OTHER)
    for first, second in zip(names[::2], names[1::2], strict=True):
        mine = [with_(name, FREE, **OTHER[name]) for name in (first, second)]
        mixed = ids(engine, [GREEDY, mine[0], GREEDY, mine[1]], PROMPTS)
        assert mixed[::2] == greedy[::2]
        assert mixed[1] == ids(engine, mine[0], PROMPTS[1])
        assert mixed[3] == ids(engine, mine[1], PROMPTS[3])


@pytest.mark.parametrize(
    "name, custom",
    [
        ("min_p", dict(min_p=1.0)),
        ("mirostat", dict(tau=0.0)),
        ("entropy_temperature", dict(theta=1e6)),
    ],
)
def test_the_strictest_parameters_are_greedy_decoding(
    engine: Engine, name: str, custom: Any
) -> None:
    assert ids(engine, with_(name, FREE, **custom), PROMPTS) == ids(engine, GREEDY, PROMPTS)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_min_p_leaves_nothing_to_drop_for_the_min_p_of_the_engine(
    engine: Engine, temperature: float
) -> None:
    sampling = with_("min_p", FREE | {"temperature": temperature}, min_p=0.07)
    own = ids(engine, sampling, PROMPTS)
    assert own == ids(engine, sampling | {"min_p": 0.0699}, PROMPTS)
    assert own != ids(engine, sampling | {"min_p": 0.2}, PROMPTS)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name, custom, oracle",
    [
        ("typical", dict(mass=0.5), lambda p: typical_exact(p, 0.501)),
        ("eta", dict(epsilon=0.05), lambda p: eta_exact(p, 0.0499)),
        ("xtc", dict(threshold=0.1, probability=1.0), lambda p: xtc_exact(p, 0.1)),
    ],
)
def test_every_token_is_one_that_the_filter_keeps(engine, reference, name, custom, oracle) -> None:
    sampling = FREE | {"temperature": 1.3, "max_new_tokens": 60}

    def share_kept(text: list[int]) -> float:
        probs = next_probs(engine, reference, PROMPTS[1], text, temperature=1.3)
        kept = [bool(oracle(p)[token]) for p, token in zip(probs, text, strict=True)]
        return float(np.mean(kept))

    assert share_kept(ids(engine, with_(name, sampling, **custom), PROMPTS[1])) == 1
    assert share_kept(ids(engine, sampling, PROMPTS[1])) < 0.9


def xtc_exact(probs: np.ndarray, threshold: float) -> np.ndarray:
    is_top = probs >= threshold
    return ~is_top | (probs <= probs[is_top].min(initial=np.inf))


@pytest.mark.oracle
def test_mirostat_keeps_its_limit_from_token_to_token(engine: Engine, reference: Any) -> None:
    tau, eta, temperature, count = 4.0, 0.2, 1.6, 250
    sampling = FREE | {"temperature": temperature, "max_new_tokens": count}
    text = ids(engine, with_("mirostat", sampling, tau=tau, eta=eta))
    probs = next_probs(engine, reference, PROMPTS[0], text, temperature=temperature)
    surprise, mu, num_limited = -np.log2(probs), 2 * tau, 0
    for each, token in zip(surprise, text, strict=True):
        assert each[token] <= max(mu, each.min()) + 0.01
        num_limited += each.max() > mu
        mu -= eta * (each[token] - tau)
    assert num_limited == count
    assert surprise[np.arange(count), text].mean() == pytest.approx(tau, abs=0.25)


def test_dry_repeats_no_pair_of_tokens_but_those_of_breakers(engine: Engine) -> None:
    prompt = "spam, spam, spam, spam,"
    sampling = GREEDY | {"max_new_tokens": 120}

    def repeats(text: list[int]) -> int:
        tokens = engine.tokenizer.encode(prompt) + text
        seen = set[tuple[int, int]]()
        found = 0
        for place, pair in enumerate(itertools.pairwise(tokens), start=1):
            is_drawn = place >= len(tokens) - len(text)
            found += is_drawn and pair in seen and BREAKER not in pair
            seen.add(pair)
        return found

    assert repeats(ids(engine, sampling, prompt)) > 10
    custom = dict(multiplier=1e4, base=1.0, allowed_length=1)
    assert repeats(ids(engine, with_("dry", sampling, **custom), prompt)) == 0


def test_a_watermark_is_found_in_the_text(engine: Engine) -> None:
    sampling = FREE | {"temperature": 1.3, "max_new_tokens": 120}
    for delta, is_marked in ((4.0, True), (0.0, False)):
        results = engine.generate(PROMPTS, with_("watermark", sampling, delta=delta))
        for result in results:
            tokens = engine.tokenizer.encode(result["text"])
            assert (watermark.detect(tokens).z > 5) is is_marked
            assert watermark.detect(tokens, key=1).z < 4


@pytest.mark.oracle
def test_a_guided_pair_writes_one_text(engine: Engine, reference: Any) -> None:
    prompts = ["A dictionary is", "In Python, a list is a sequence. It is"]
    pair = lambda number, scale, sampling: ids(
        engine, classifier_free_guidance.pair_of(number, scale, sampling), prompts
    )
    greedy, same = pair(1, 2.5, GREEDY)
    assert greedy == same
    log_probs, guide = (np.log(next_probs(engine, reference, each, greedy)) for each in prompts)
    assert greedy == (2.5 * log_probs - 1.5 * guide).argmax(axis=1).tolist()
    assert pair(1, 1.0, GREEDY) == [ids(engine, GREEDY, prompts[0])] * 2 != [greedy] * 2
    drawn, same = pair(0, 2.5, FREE)
    assert drawn == same != greedy
    two = classifier_free_guidance.pair_of(3, 2.5, GREEDY)
    two += classifier_free_guidance.pair_of(4, 2.5, FREE)
    order = [two[0], two[2], two[3], two[1]]
    texts = [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert ids(engine, order, texts) == [greedy, drawn, drawn, greedy]


def test_many_pairs_and_long_ones_stay_together(engine: Engine) -> None:
    """More than run at a time, and longer than a step reads."""
    rng = np.random.default_rng(0)
    lengths = [(3, 90), (150, 70), (1, 2), (64, 65), (20, 7), (129, 1)]
    prompts = [rng.integers(20, 900, size).tolist() for pair in lengths for size in pair]
    params = [
        each
        for number in range(len(lengths))
        for each in classifier_free_guidance.pair_of(number, 1.5, GREEDY)
    ]
    together = engine.generate(input_ids=prompts, sampling_params=params)
    texts = [result["output_ids"] for result in together]
    assert texts[::2] == texts[1::2]
    for first in range(0, len(prompts), 2):
        pair = slice(first, first + 2)
        alone = engine.generate(input_ids=prompts[pair], sampling_params=params[pair])
        assert [result["output_ids"] for result in alone] == texts[pair]


def test_a_prompt_without_its_guide_is_ended(engine: Engine) -> None:
    alone = classifier_free_guidance.pair_of(0, 1.5, GREEDY)[0]
    result = engine.generate(PROMPTS[0], alone)
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "NaN happened"}


@pytest.mark.oracle
def test_contrast_is_with_the_amateur(engine: Engine, reference: Any) -> None:
    text = ids(engine, with_("contrastive", GREEDY, alpha=0.01), PROMPTS[1])
    expert = next_probs(engine, reference, PROMPTS[1], text)
    before = [engine.tokenizer.encode(PROMPTS[1])[-1], *text[:-1]]
    score = np.log(expert) - np.log(softmax_exact(BIGRAMS[np.array(before) % 64]))
    is_plausible = expert >= 0.01 * expert.max(axis=1, keepdims=True)
    assert text == np.where(is_plausible, score, -np.inf).argmax(axis=1).tolist()
    assert text != ids(engine, GREEDY, PROMPTS[1])


def test_the_example_for_newcomers_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = lambda **given: Engine(**SMALL | given)  # with few steps to compile
    monkeypatch.setattr(jaxengine, "Engine", make)
    monkeypatch.setattr(sys, "argv", ["custom_sampler.py"])
    runpy.run_path(str(EXAMPLES / "custom_sampler.py"), run_name="__main__")
    out = capsys.readouterr().out
    texts = re.findall(r"n = [\d.]+: A dictionary is(.+?)\n\n(?=n =|$)", out, re.DOTALL)
    assert len(set(texts)) == 3
