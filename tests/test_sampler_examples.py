"""The samplers of `examples/samplers` against what their papers say, in NumPy float64 and loops."""

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import softmax_exact
from samplers import (
    classifier_free_guidance,
    contrastive,
    dry,
    entropy_temperature,
    eta,
    min_p,
    mirostat,
    speculative,
    typical,
    watermark,
    xtc,
)
from scipy import stats

from jaxengine.sampling import empty_state
from jaxengine.sampling.extensions import LogitsProcessor, Row

V = 97
AMATEUR = np.cos(np.arange(V), dtype=np.float32)
FILTERS = {"min_p": min_p, "typical": typical, "eta": eta}
STATELESS = {name: module.PROCESSOR for name, module in FILTERS.items()} | {
    "xtc": xtc.PROCESSOR,
    "dry": dry.processor([3]),
    "watermark": watermark.PROCESSOR,
    "entropy_temperature": entropy_temperature.PROCESSOR,
    "contrastive": contrastive.processor(lambda tokens, length: jnp.asarray(AMATEUR)),
}


def row_of(
    tokens: Sequence[int] = (0,), *, temperature: float = 1.0, seed: int = 0, prompt_len: int = 1
) -> Row:
    """A request's, with room for some tokens more, where anything may stand."""
    sampling = jax.tree.map(lambda field: field[0], empty_state(1, 4, 4))
    return Row(
        tokens=jnp.asarray([*tokens, *[tokens[-1]] * 5], jnp.int32),
        length=jnp.int32(len(tokens)),
        prompt_len=jnp.int32(prompt_len),
        key=jax.random.fold_in(jax.random.key(seed), len(tokens)),
        sampling=sampling._replace(temperature=jnp.float32(temperature)),
    )


def params_of(processor: LogitsProcessor, **custom: Any) -> dict[str, jax.Array]:
    """The defaults, some of them replaced by values of the same shape and dtype."""
    assert custom.keys() <= processor.params.keys()
    defaults = {name: jnp.asarray(value) for name, value in processor.params.items()}
    return {
        name: jnp.asarray(custom.get(name, default), default.dtype)
        for name, default in defaults.items()
    }


def run(processor: LogitsProcessor, logits: Any, row: Row | None = None, **custom: Any) -> Any:
    """One row, compiled."""
    logits = jnp.asarray(logits, jnp.float32)
    row = row_of() if row is None else row
    return np.asarray(jax.jit(processor.function)(logits, params_of(processor, **custom), row))


def kept(module: ModuleType, logits: Any, *, temperature: float = 1.0, **custom: Any) -> np.ndarray:
    """[V]: which tokens a filter keeps; those it leaves as they were."""
    logits = np.asarray(logits, np.float32)
    out = run(module.PROCESSOR, logits, row_of(temperature=temperature), **custom)
    is_kept = np.isfinite(out)
    np.testing.assert_array_equal(out[is_kept], logits[is_kept])
    assert np.isneginf(out[~is_kept]).all()
    return is_kept


def entropy_exact(probs: np.ndarray) -> float:
    """Nats."""
    return -sum(p * np.log(p) for p in probs if p > 0)


# All of them


@pytest.mark.parametrize("name", STATELESS)
def test_rows_side_by_side_are_rows_alone(name: str, rng: np.random.Generator) -> None:
    processor, B = STATELESS[name], 4
    logits = jnp.asarray(rng.standard_normal((B, V)) * 3, jnp.float32)
    histories = rng.integers(0, 2, (B, 12))
    rows = [
        row_of(tokens.tolist(), temperature=0.5 * b, seed=b) for b, tokens in enumerate(histories)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    params = jax.tree.map(lambda value: jnp.stack([value] * B), params_of(processor))
    together = jax.jit(jax.vmap(processor.function))(logits, params, stacked)
    assert together.shape == logits.shape and together.dtype == logits.dtype
    alone = [run(processor, logits[b], rows[b]) for b in range(B)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6, atol=1e-6)
    assert not np.array_equal(together, logits)


@pytest.mark.parametrize("name", STATELESS)
def test_what_stands_behind_the_last_token_does_not_matter(
    name: str, rng: np.random.Generator
) -> None:
    logits, row = rng.standard_normal(V), row_of(rng.integers(0, 4, 20).tolist())
    other = row._replace(tokens=row.tokens.at[20:].set(jnp.asarray([1, 2, 1, 2, 1], jnp.int32)))
    np.testing.assert_array_equal(
        run(STATELESS[name], logits, row), run(STATELESS[name], logits, other)
    )


@pytest.mark.parametrize("name", sorted(STATELESS.keys() - {"contrastive"}))
def test_tokens_that_are_out_stay_out_and_one_is_always_left(
    name: str, rng: np.random.Generator
) -> None:
    logits = rng.standard_normal(V)
    logits[::2] = -np.inf
    out = run(STATELESS[name], logits, row_of([5, 1, 5, 1, 5]))
    assert np.isneginf(out[::2]).all() and np.isfinite(out).any() and not np.isnan(out).any()
    only = np.where(np.arange(V) == 7, 1.5, -np.inf)
    out = run(STATELESS[name], only, row_of([5, 1, 5, 1, 5]))
    assert np.flatnonzero(np.isfinite(out)).tolist() == [7]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("name", ["min_p", "eta", "entropy_temperature"])
def test_the_likeliest_token_stays_the_likeliest(
    name: str, temperature: float, rng: np.random.Generator
) -> None:
    logits = rng.standard_normal(V) * 4
    out = run(STATELESS[name], logits, row_of(temperature=temperature))
    assert out.argmax() == logits.argmax()


# Filters


@pytest.mark.parametrize(
    "module, custom, probs, expected",
    [
        (min_p, dict(min_p=0.3), [0.5, 0.2, 0.16, 0.14], [1, 1, 1, 0]),
        (min_p, dict(min_p=0.0), [0.5, 0.2, 0.16, 0.14], [1, 1, 1, 1]),
        (min_p, dict(min_p=1.0), [0.1, 0.4, 0.4, 0.1], [0, 1, 1, 0]),  # a tie
        (min_p, dict(min_p=0.9), [1.0], [1]),
        # H = 1.23: distances 0.54, 0.38, 0.60, 0.73
        (typical, dict(mass=0.15), [0.5, 0.2, 0.16, 0.14], [0, 1, 0, 0]),
        (typical, dict(mass=0.6), [0.5, 0.2, 0.16, 0.14], [1, 1, 0, 0]),
        (typical, dict(mass=0.8), [0.5, 0.2, 0.16, 0.14], [1, 1, 1, 0]),
        (typical, dict(mass=1.0), [0.5, 0.2, 0.16, 0.14], [1, 1, 1, 1]),
        (typical, dict(mass=0.1), [0.4, 0.1, 0.1, 0.4], [1, 0, 0, 1]),  # a tie
        (typical, dict(mass=0.9), [1.0], [1]),
        (eta, dict(epsilon=0.15), [0.5, 0.2, 0.16, 0.14], [1, 1, 1, 1]),  # 0.39 exp(-1.23) = 0.11
        (eta, dict(epsilon=0.15), [0.9, 0.08, 0.01, 0.01], [1, 0, 0, 0]),  # epsilon is less
        (eta, dict(epsilon=0.9), [0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1]),
        (eta, dict(epsilon=0.9), [0.3, 0.25, 0.25, 0.2], [1, 1, 1, 0]),  # 0.95 exp(-1.38) = 0.24
        (eta, dict(epsilon=0.9), [1.0], [1]),
    ],
)  # fmt: skip
def test_filters_on_distributions_written_by_hand(module, custom, probs, expected) -> None:
    logits = np.log(probs) + 3
    assert kept(module, logits, **custom).astype(int).tolist() == expected


def min_p_exact(probs: np.ndarray, min_p: float) -> np.ndarray:
    return probs >= min_p * probs.max()


def typical_exact(probs: np.ndarray, mass: float) -> np.ndarray:
    distance = np.abs(-np.log(probs) - entropy_exact(probs))
    result, total = np.zeros(len(probs), bool), 0.0
    for token in np.argsort(distance):
        if total < mass:
            result[token], total = True, total + probs[token]
    return result


def eta_exact(probs: np.ndarray, epsilon: float) -> np.ndarray:
    return probs >= min(epsilon, np.sqrt(epsilon) * np.exp(-entropy_exact(probs)))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "module, oracle, custom",
    [
        (min_p, min_p_exact, dict(min_p=0.1)),
        (typical, typical_exact, dict(mass=0.2)),
        (typical, typical_exact, dict(mass=0.95)),
        (eta, eta_exact, dict(epsilon=3e-4)),
        (eta, eta_exact, dict(epsilon=0.02)),
    ],
)
def test_filters_are_those_of_their_papers(module, oracle, custom, temperature, rng) -> None:
    num_kept = []
    for scale in (0.3, 1.0, 3.0, 10.0):
        logits = (rng.standard_normal(V) * scale).astype(np.float32)
        probs = softmax_exact(logits.astype(np.float64) / (temperature or 1))
        got = kept(module, logits, temperature=temperature, **custom)
        np.testing.assert_array_equal(got, oracle(probs, **custom))
        num_kept.append(got.sum())
    assert min(num_kept) < max(num_kept)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "module, warper, custom",
    [
        (min_p, "MinPLogitsWarper", dict(min_p=0.07)),
        (typical, "TypicalLogitsWarper", dict(mass=0.8)),
        (eta, "EtaLogitsWarper", dict(epsilon=0.01)),
    ],
)
def test_filters_are_those_of_transformers(module, warper, custom, rng) -> None:
    import torch
    import transformers

    logits = rng.standard_normal(V).astype(np.float32) * 2
    expected = getattr(transformers, warper)(*custom.values())(None, torch.tensor(logits[None]))
    np.testing.assert_array_equal(kept(module, logits, **custom), np.isfinite(expected[0].numpy()))


# XTC


@pytest.mark.parametrize(
    "probs, expected",
    [
        ([0.5, 0.2, 0.16, 0.14], [0, 0, 1, 1]),
        ([0.2, 0.14, 0.5, 0.16], [0, 1, 0, 1]),
        ([0.9, 0.08, 0.02], [1, 1, 1]),  # one top choice: nothing else would be left to say
        ([0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.16], [1, 1, 1, 1, 1, 1, 1]),
        ([0.4, 0.2, 0.2, 0.2], [0, 1, 1, 1]),  # a tie
        ([1.0], [1]),
    ],
)
def test_all_top_choices_but_the_least_are_excluded(probs, expected) -> None:
    out = kept(xtc, np.log(probs), threshold=0.15, probability=1)
    assert out.astype(int).tolist() == expected
    assert kept(xtc, np.log(probs), threshold=0.15, probability=0).all()


def test_temperature_makes_and_unmakes_top_choices() -> None:
    logits = np.log([0.6, 0.3, 0.1])
    for temperature, expected in ((1, [0, 1, 1]), (0.3, [1, 1, 1]), (9, [0, 0, 1]), (0, [0, 1, 1])):
        out = kept(xtc, logits, temperature=temperature, threshold=0.25, probability=1)
        assert out.astype(int).tolist() == expected, temperature


def test_exclusion_happens_as_often_as_asked() -> None:
    logits = jnp.log(jnp.asarray([0.6, 0.4]))
    rows = [row_of(temperature=1, seed=seed) for seed in range(2)]
    keys = jax.random.split(jax.random.key(0), 2000)
    params = params_of(xtc.PROCESSOR, probability=0.3)
    out = jax.jit(jax.vmap(lambda key: xtc.xtc(logits, params, rows[0]._replace(key=key))))(keys)
    num_excluded = int(np.isneginf(out[:, 0]).sum())
    assert stats.binomtest(num_excluded, len(keys), 0.3).pvalue > 1e-3


# Mirostat


def simulate(
    probs: np.ndarray, count: int, *, temperature: float = 1.0, **custom: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn from one distribution, and the limit before each."""
    logits, params = (
        jnp.log(jnp.asarray(probs, jnp.float32)),
        params_of(mirostat.PROCESSOR, **custom),
    )
    row = row_of(temperature=temperature)

    def step(state: mirostat.State, key: jax.Array) -> tuple[mirostat.State, Any]:
        out, new = mirostat.truncate(logits, params, row, state)
        token = jax.random.categorical(key, out / mirostat.temperature_of(row))
        return mirostat.after(new, params, row, token, out), (token, state.max_surprise)

    keys = jax.random.split(jax.random.key(1), count)
    _, drawn = jax.jit(lambda keys: jax.lax.scan(step, mirostat.init(params), keys))(keys)
    return np.asarray(drawn[0]), np.asarray(drawn[1])


ZIPF = np.arange(1.0, 5001) ** -1.5
ZIPF /= ZIPF.sum()


@pytest.mark.parametrize("tau, temperature", [(2.0, 1.0), (3.0, 1.0), (5.0, 1.7), (7.0, 1.7)])
def test_the_mean_surprise_is_the_target(tau: float, temperature: float) -> None:
    tokens, _ = simulate(ZIPF, 3000, tau=tau, eta=0.1, temperature=temperature)
    surprise = -np.log2(softmax_exact(np.log(ZIPF) / temperature))
    assert abs(surprise[tokens].mean() - tau) < 0.05
    plain = (surprise * 2**-surprise).sum()
    assert abs(plain - tau) > 0.5  # it took some doing


def test_the_limit_moves_by_the_error_of_each_token() -> None:
    tokens, limits = simulate(ZIPF, 200, tau=2.0, eta=0.3)
    surprise = -np.log2(ZIPF)
    mu = 4.0
    for token, limit in zip(tokens, limits, strict=True):
        assert limit == pytest.approx(mu, abs=1e-3)
        assert surprise[token] <= max(mu, surprise.min()) + 1e-3
        mu -= 0.3 * (surprise[token] - 2.0)


def test_a_distribution_that_surprises_more_than_allowed_leaves_its_likeliest() -> None:
    tokens, _ = simulate(np.array([0.01] * 98 + [0.02]), 50, tau=0.1)
    assert set(tokens[1:].tolist()) == {98}  # the first limit is 2 tau, the next ones are less


# DRY


def dry_exact(
    logits: np.ndarray,
    tokens: Sequence[int],
    breakers: Sequence[int],
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
) -> np.ndarray:
    """By looking at every earlier place and walking back from it."""
    longest: dict[int, int] = {}
    n = len(tokens)
    for place in range(1, n):
        match = 0
        while match < min(place, dry.MAX_MATCH):
            token = tokens[n - 1 - match]
            if tokens[place - 1 - match] != token or token in breakers:
                break
            match += 1
        longest[tokens[place]] = max(longest.get(tokens[place], 0), match)
    out = logits.astype(np.float64)
    for token, match in longest.items():
        if match >= max(allowed_length, 1) and token not in breakers:
            out[token] -= multiplier * base ** (match - allowed_length)
    return out


@pytest.mark.parametrize("breakers", [(), (2,), (0, 3)])
@pytest.mark.parametrize(
    "vocab_size, length", [(2, 1), (2, 2), (2, 60), (4, 40), (4, 200), (9, 80)]
)
def test_penalties_are_those_of_a_walk_through_the_text(vocab_size, length, breakers, rng) -> None:
    processor = dry.processor(breakers)
    for allowed_length in (0, 1, 2, 4):
        tokens = rng.integers(0, vocab_size, length).tolist()
        logits = rng.standard_normal(9).astype(np.float32)
        custom: Any = dict(multiplier=0.7, base=1.3, allowed_length=allowed_length)
        out = run(processor, logits, row_of(tokens), **custom)
        exact = dry_exact(logits, tokens, breakers, **custom)
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)


def test_a_long_repetition_costs_as_much_as_the_longest_that_counts() -> None:
    tokens = [*range(8)] * 20
    out = run(dry.processor(), np.zeros(8), row_of(tokens), base=1.1)
    assert out[0] == pytest.approx(-0.8 * 1.1 ** (dry.MAX_MATCH - 2), rel=1e-4)
    assert (out[1:] == 0).all()


# Watermark


def test_green_lists_have_their_share_whatever_the_token_before(rng: np.random.Generator) -> None:
    ids, previous = np.arange(4096)[None, :], np.arange(400)[:, None]
    green = np.asarray(watermark.is_green(previous, ids, np.uint32(1), 0.25))
    counts = green.sum(axis=1)
    assert stats.kstest((counts - 1024) / np.sqrt(768), "norm").pvalue > 1e-3
    for shifted in (green[:, 1:] & green[:, :-1], green[1:] & green[:-1]):  # neighbours
        assert shifted.mean() == pytest.approx(1 / 16, abs=1e-3)
    other = np.asarray(watermark.is_green(previous, ids, np.uint32(2), 0.25))
    assert (green & other).mean() == pytest.approx(1 / 16, abs=1e-3)


def test_every_bit_of_the_hash_depends_on_every_other(rng: np.random.Generator) -> None:
    words = rng.integers(0, 2**32, (4096, 1), dtype=np.uint32)
    flipped = words ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))[None, :]
    hashed = watermark.mixed(jnp.asarray(words)) ^ watermark.mixed(jnp.asarray(flipped))
    changed = np.asarray(hashed)
    for bit in range(32):
        np.testing.assert_allclose((changed >> bit & 1).mean(axis=0), 0.5, atol=0.05)


def test_green_logits_are_raised_and_no_others() -> None:
    row = row_of([8, 15])
    out = run(watermark.PROCESSOR, np.zeros(50), row, gamma=0.5, delta=1.25)
    green = np.asarray(watermark.is_green(15, np.arange(50), np.uint32(watermark.KEY), 0.5))
    np.testing.assert_array_equal(out, np.where(green, 1.25, 0))
    assert 10 < green.sum() < 40


def write(count: int, **custom: Any) -> list[int]:
    """Text drawn from a Zipf distribution, with the processor's help."""
    logits = jnp.log(jnp.asarray(ZIPF[:500], jnp.float32))
    params, row = params_of(watermark.PROCESSOR, **custom), row_of()

    def step(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        now = row._replace(tokens=row.tokens.at[0].set(token))
        drawn = jax.random.categorical(key, watermark.watermark(logits, params, now))
        return drawn.astype(jnp.int32), drawn

    keys = jax.random.split(jax.random.key(3), count)
    return jax.jit(lambda: jax.lax.scan(step, jnp.int32(0), keys))()[1].tolist()


def test_the_mark_is_found_with_its_key_and_nowhere_else() -> None:
    marked, plain = write(400, delta=2.0), write(400, delta=0.0)
    assert watermark.detect(marked).z > 8 and watermark.detect(marked).p_value < 1e-12
    assert abs(watermark.detect(plain).z) < 3
    assert abs(watermark.detect(marked, key=7).z) < 3


def test_the_score_is_the_formula_and_repetitions_do_not_count() -> None:
    tokens = np.random.default_rng(1).integers(0, 1000, 300).tolist()
    found = watermark.detect(tokens, gamma=0.4)
    s = sum(
        bool(watermark.is_green(*pair, np.uint32(watermark.KEY), 0.4))
        for pair in set(itertools.pairwise(tokens))
    )
    T = len(set(itertools.pairwise(tokens)))
    assert (found.num_pairs, found.num_green) == (T, s)
    assert found.z == pytest.approx((s - 0.4 * T) / np.sqrt(T * 0.24))
    assert found.p_value == pytest.approx(stats.norm.sf(found.z))
    assert watermark.detect([4, 5] * 100).num_pairs == 2
    with pytest.raises(ValueError, match="expected at least 2, got 1"):
        watermark.detect([1])


# Entropy-adaptive temperature


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_distribution_gets_its_temperature(scale: float, rng: np.random.Generator) -> None:
    logits = (rng.standard_normal(V) * scale).astype(np.float32)
    T0, n, theta = 0.7, 0.8, 1.5
    T = T0 * n ** (theta / entropy_exact(softmax_exact(logits)))
    assert 0.05 < T < T0
    out = run(STATELESS["entropy_temperature"], logits, row_of(temperature=T0), n=n, theta=theta)
    expected = softmax_exact(logits.astype(np.float64) / T)
    np.testing.assert_allclose(softmax_exact(out / T0), expected, rtol=1e-4, atol=1e-9)


def test_no_theta_no_effect_and_no_entropy_no_doubt() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    out = run(STATELESS["entropy_temperature"], logits, theta=0)
    np.testing.assert_allclose(softmax_exact(out), [0.5, 0.3, 0.2], rtol=1e-5)
    out = run(STATELESS["entropy_temperature"], [90.0, 0.0, -90.0])
    assert out[0] == 0 and (out[1:] < -1e5).all() and np.isfinite(out).all()


# Contrastive decoding


def test_the_score_is_the_difference_where_the_expert_finds_it_plausible(rng) -> None:
    expert, amateur = rng.standard_normal((2, V)).astype(np.float32) * 2
    amateurs = jnp.stack([jnp.asarray(amateur), jnp.zeros(V)])
    processor = contrastive.processor(lambda tokens, length: amateurs[tokens[length - 1]])
    out = run(processor, expert, row_of([1, 0]), alpha=0.05, temperature=0.5)
    p, q = softmax_exact(expert), softmax_exact(amateur / 0.5)
    expected = np.where(p >= 0.05 * p.max(), np.log(p) - np.log(q), -np.inf)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert 1 < np.isfinite(out).sum() < V
    alone = run(processor, expert, row_of([0, 1]))  # this amateur has no preferences
    assert alone.argmax() == expert.argmax()


# Classifier-free guidance


def guide(
    logits: np.ndarray,
    pairs: Any,
    is_guide: Sequence[bool],
    scale: float,
    *,
    temperature: Sequence[float],
    num_drawn: Sequence[int],
) -> np.ndarray:
    """[B V], by the batched function. All rows have prompts of different lengths."""
    B, one = len(pairs), row_of()
    prompt_len = jnp.arange(1, B + 1)
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), one)._replace(
        length=prompt_len + jnp.asarray(num_drawn), prompt_len=prompt_len
    )
    stacked = stacked._replace(
        key=jax.vmap(jax.random.fold_in, (None, 0))(one.key, stacked.length),
        sampling=stacked.sampling._replace(temperature=jnp.asarray(temperature, jnp.float32)),
    )
    params = {
        "pair": jnp.asarray(pairs, jnp.int32),
        "is_guide": jnp.asarray(is_guide),
        "scale": jnp.full(B, scale, jnp.float32),
    }
    return np.asarray(jax.jit(classifier_free_guidance.guide)(jnp.asarray(logits), params, stacked))


def test_prompt_and_guide_get_the_token_of_the_guided_distribution(rng) -> None:
    logits = rng.standard_normal((5, V)).astype(np.float32) * 2
    pairs, is_guide = [4, -1, 9, 4, 9], [False, False, True, True, False]
    rows: Any = dict(temperature=[0.0] * 5, num_drawn=[2, 2, 3, 2, 3])
    for scale in (0.0, 1.0, 1.5, 3.0):
        out = guide(logits, pairs, is_guide, scale, **rows)
        log_probs = np.log(softmax_exact(logits))
        for prompt, other in ((0, 3), (4, 2)):
            exact = scale * log_probs[prompt] + (1 - scale) * log_probs[other]
            token = exact.argmax()
            for row in (prompt, other):
                assert np.flatnonzero(np.isfinite(out[row])).tolist() == [token]
                assert out[row, token] == pytest.approx(exact[token], abs=1e-4)
        assert np.isnan(out[1]).all()  # nobody guides it


def test_a_pair_out_of_step_is_told_so(rng) -> None:
    logits = rng.standard_normal((2, V)).astype(np.float32)
    out = guide(logits, [0, 0], [False, True], 2.0, temperature=[1, 1], num_drawn=[3, 2])
    assert np.isnan(out).all()
    out = guide(logits, [0, 0], [False, False], 2.0, temperature=[1, 1], num_drawn=[3, 3])
    assert np.isnan(out).all()


def test_a_token_that_either_may_not_have_neither_gets(rng) -> None:
    logits = rng.standard_normal((2, 4)).astype(np.float32)
    logits[0, 0] = logits[1, 1] = -np.inf
    for scale in (0.0, 2.0):
        out = guide(logits, [0, 0], [False, True], scale, temperature=[0, 0], num_drawn=[0, 0])
        assert not np.isnan(out).any() and np.isneginf(out[:, :2]).all()


def test_guided_draws_have_the_guided_distribution(rng) -> None:
    count, V = 1500, 5
    logits = rng.standard_normal((2, V)).astype(np.float32)
    numbers = np.repeat(np.arange(count), 2)
    out = guide(
        np.tile(logits, (count, 1)), numbers, [False, True] * count, 1.7,
        temperature=[0.8, 5.0] * count, num_drawn=[0, 0] * count,
    )  # fmt: skip
    tokens = np.isfinite(out).argmax(axis=1)
    np.testing.assert_array_equal(tokens[::2], tokens[1::2])
    log_probs = np.log(softmax_exact(logits))
    expected = softmax_exact((1.7 * log_probs[0] - 0.7 * log_probs[1]) / 0.8)
    assert stats.chisquare(np.bincount(tokens[::2], minlength=V), expected * count).pvalue > 1e-3


def test_parameters_of_a_pair_differ_in_who_guides() -> None:
    prompt, guide = classifier_free_guidance.pair_of(3, 1.5, {"max_new_tokens": 4})
    assert prompt["custom_params"] == {"pair": 3, "is_guide": False, "scale": 1.5}
    assert guide == prompt | {"custom_params": {"pair": 3, "is_guide": True, "scale": 1.5}}
    assert prompt["max_new_tokens"] == 4


# Speculative sampling


def speculate(q: np.ndarray, p: np.ndarray, count: int) -> tuple[np.ndarray, Any]:
    """Drafts [count K] from q [K V], and what became of each."""
    draft_probs, target_probs = jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32)

    def one(key: jax.Array) -> tuple[jax.Array, speculative.Accepted]:
        draft_key, key = jax.random.split(key)
        draft = jax.random.categorical(draft_key, jnp.log(draft_probs), axis=1)
        return draft, speculative.accept(draft, draft_probs, target_probs, key)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))


def test_what_comes_out_has_the_target_distribution(rng) -> None:
    K, V, count = 2, 4, 20_000
    q = softmax_exact(rng.standard_normal((K, V)) * 1.5)
    p = softmax_exact(rng.standard_normal((K + 1, V)) * 1.5)
    p[1, 2], p[1] = 0, p[1] / (1 - p[1, 2])  # the draft may propose what the target never says
    p[1] = p[1] / p[1].sum()
    draft, (num_accepted, next_token) = speculate(q, p, count)
    out = np.column_stack([draft, np.zeros(count, int)])
    out[np.arange(count), num_accepted] = next_token
    for place in range(K + 1):  # of those that got so far
        tokens = out[num_accepted >= place, place]
        counts, expected = np.bincount(tokens, minlength=V), p[place] * len(tokens)
        assert (counts[expected == 0] == 0).all()
        is_possible = expected > 0
        assert stats.chisquare(counts[is_possible], expected[is_possible]).pvalue > 1e-3, place
    # Independent of each other, too.
    pairs = out[num_accepted >= 1]
    table = np.zeros((V, V))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    assert (num_accepted == K).any() and (num_accepted == 0).any()
    rate = np.minimum(p[0], q[0]).sum()
    assert stats.binomtest(int((num_accepted > 0).sum()), count, rate).pvalue > 1e-3


def test_an_equal_draft_is_accepted_and_an_impossible_one_is_not() -> None:
    p = softmax_exact(np.arange(12.0).reshape(3, 4) % 5)
    _, (num_accepted, _) = speculate(p[:2], p, 500)
    assert (num_accepted == 2).all()
    q, p = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    _, (num_accepted, next_token) = speculate(q, p, 500)
    assert (num_accepted == 0).all() and set(np.asarray(next_token).tolist()) == {1, 2}
