"""Sampling against hand-written distributions, float64 oracles, and exact frequencies."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from numerics import kept_exact, sampling_probs_exact, softmax_exact
from scipy import stats

from jaxengine.pallas_kernels import noise as noises
from jaxengine.sampling import (
    SamplingState,
    adjust,
    empty_state,
    install,
    of_request,
    pack,
    sample,
)
from jaxengine.sampling.adjust import count_tokens, tokens_between
from jaxengine.sampling.draw import add_up, by_groups, draw
from jaxengine.sampling.filters import find_limits, keeps
from jaxengine.sampling_params import SamplingParams

NUM_STOP_IDS, NUM_BIAS = 4, 8


@jax.jit
def run(logits, params, tokens, lengths):
    """`adjust` and `sample` with a history per row."""
    adjusted = adjust(logits, params, tokens, jnp.arange(len(lengths)), lengths)
    return sample(adjusted, params, lengths)


def state_of(
    params: list[SamplingParams], *, prompt_lens=None, seeds=None, stop_ids=()
) -> SamplingState:
    """One row for each request, by way of packing and installing."""
    state = empty_state(len(params), NUM_STOP_IDS, NUM_BIAS)
    for slot, one in enumerate(params):
        packed = of_request(
            pack(one, stop_ids=stop_ids, num_stop_ids=NUM_STOP_IDS, num_bias=NUM_BIAS),
            prompt_len=0 if prompt_lens is None else prompt_lens[slot],
            seed=slot if seeds is None else seeds[slot],
        )
        state = jax.jit(install)(state, jnp.asarray([slot]), jnp.asarray(packed)[None])
    return state


def draw_many(probs, count: int = 4000, **params) -> np.ndarray:
    """Frequencies of `count` draws from one row of probabilities."""
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    state = state_of([SamplingParams(**params)])
    state = SamplingState(*(jnp.repeat(field, count, axis=0) for field in state))
    tokens = run(
        jnp.broadcast_to(logits, (count, len(probs))),
        state,
        jnp.zeros((count, 1), jnp.int32),
        jnp.arange(count, dtype=jnp.int32),
    )
    return np.bincount(np.asarray(tokens), minlength=len(probs)) / count


def sample_rows(
    logits, params: list[SamplingParams], *, history=None, lengths=None, **state
) -> np.ndarray:
    B = len(params)
    history = np.zeros((B, 1)) if history is None else history
    lengths = np.zeros(B) if lengths is None else lengths
    tokens = run(
        jnp.asarray(logits, jnp.float32),
        state_of(params, **state),
        jnp.asarray(history, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )
    return np.asarray(tokens)


def kept_rows(logits, params: list[SamplingParams]) -> np.ndarray:
    """[B V]: which tokens pass the test that the draw puts its own to."""
    return np.asarray(keeps_each(jnp.asarray(logits, jnp.float32), state_of(params)))


@jax.jit
def keeps_each(logits, params):
    rows = by_groups(logits, params, jnp.zeros(len(logits), jnp.int32))
    nothing = jnp.full_like(rows.top, -jnp.inf)
    total = add_up(rows, nothing, nothing).mass.sum(axis=1)
    limits = find_limits(params, rows.top, total, logits.shape[1])

    def test(logit):
        above = add_up(rows, logit, limits.floor)
        return keeps(limits, logit, above.count.sum(axis=1), above.mass.sum(axis=1))

    return jax.lax.map(test, logits.T).T


def same(token: int, rows: int) -> list[int]:
    return [token] * rows


# State


def test_packed_parameters_arrive_in_their_slot_and_nowhere_else():
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        frequency_penalty=-0.5,
        presence_penalty=1.5,
        repetition_penalty=1.2,
        min_new_tokens=3,
        logit_bias={"7": -2.5, 1: 4.0},
    )
    room = dict(num_stop_ids=NUM_STOP_IDS, num_bias=NUM_BIAS)
    shared = pack(params, stop_ids=(9, 2), **room)
    others = shared.copy()
    packed = of_request(shared, prompt_len=11, seed=-2)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(shared, others)
    before = empty_state(3, **room)
    after = install(before, jnp.asarray([1]), jnp.asarray(packed)[None])
    got: Any = jax.tree.map(lambda field: np.asarray(field[1]), after)
    for name in ("temperature", "top_p", "min_p", "frequency_penalty", "repetition_penalty"):
        assert getattr(got, name) == np.float32(getattr(params, name)), name
    assert (got.presence_penalty, got.top_k, got.min_new_tokens, got.prompt_lens) == (1.5, 5, 3, 11)
    assert got.seed.tolist() == [0xFFFFFFFF, 0xFFFFFFFE]
    assert got.stop_ids.tolist() == [9, 2, -1, -1]
    assert got.bias_ids[:2].tolist() == [7, 1] and got.bias_values[:2].tolist() == [-2.5, 4.0]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[::2], new[::2])


def test_a_slot_beyond_the_last_installs_nothing():
    state = empty_state(2, NUM_STOP_IDS, NUM_BIAS)
    packed = np.full_like(pack_default(), 7)
    after = install(state, jnp.asarray([2]), jnp.asarray(packed)[None])
    for old, new in zip(state, after, strict=True):
        np.testing.assert_array_equal(old, new)


def pack_default(**params) -> np.ndarray:
    room = dict(num_stop_ids=NUM_STOP_IDS, num_bias=NUM_BIAS)
    return pack(SamplingParams(**params), stop_ids=(), **room)


def test_extreme_numbers_stay_finite_in_float32():
    packed = pack_default(temperature=1e300, logit_bias={0: -1e300})
    state = empty_state(1, NUM_STOP_IDS, NUM_BIAS)
    state = install(state, jnp.asarray([0]), jnp.asarray(packed)[None])
    assert np.isfinite(state.temperature).all() and np.isfinite(state.bias_values).all()


def test_too_many_stop_ids_or_biases_are_refused():
    room = dict(num_stop_ids=1, num_bias=1)
    with pytest.raises(ValueError, match="stop_token_ids: expected at most 1"):
        pack(SamplingParams(), stop_ids=(1, 2), **room)
    with pytest.raises(ValueError, match="logit_bias: expected at most 1"):
        pack(SamplingParams(logit_bias={0: 1, 1: 1}), stop_ids=(), **room)


# Greedy


def test_greedy_is_the_argmax_whatever_the_rest_of_the_batch_does(rng):
    logits = rng.standard_normal((9, 131)).astype(np.float32)
    logits[4, 7] = logits[4, 99] = 10  # a tie goes to the first
    busy = SamplingParams(
        top_p=0.5, top_k=3, min_p=0.1, frequency_penalty=1, repetition_penalty=1.3,
        min_new_tokens=9, logit_bias={3: 50},
    )  # fmt: skip
    params = [SamplingParams(temperature=0) if row % 2 == 0 else busy for row in range(9)]
    history = rng.integers(0, 131, (9, 40))
    tokens = sample_rows(logits, params, history=history, lengths=np.full(9, 40), stop_ids=(1, 2))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(axis=1)[::2])
    assert tokens[4] == 7


def test_tiny_temperatures_are_greedy(rng):
    logits = rng.standard_normal((3, 50))
    params = [SamplingParams(temperature=t) for t in (0, 1e-7, 9e-7)]
    np.testing.assert_array_equal(sample_rows(logits, params), logits.argmax(axis=1))


# Penalties, bans, biases


@pytest.mark.parametrize(
    "params, expected",
    [
        (dict(), 0),
        (dict(frequency_penalty=0.9), 0),  # 3.2, 3.1, 3
        (dict(frequency_penalty=1.1), 2),  # 2.8, 2.9, 3
        (dict(presence_penalty=1.5), 0),  # 3.5, 2.5, 3
        (dict(presence_penalty=2), 0),  # 3, 2, 3
        (dict(frequency_penalty=-2), 0),
        (dict(repetition_penalty=1.5), 0),  # 3.3, 2.7, 3
        (dict(repetition_penalty=2.0), 2),  # 2.5, 2, 3
        (dict(frequency_penalty=-2, repetition_penalty=2.0), 0),  # 4.5, 3, 3
    ],
)
def test_penalties_count_generated_tokens_only(params, expected):
    prompt, generated = [2, 2, 2, 2], [0, 1, 0]
    got = sample_rows(
        [[5.0, 4.0, 3.0, -1.0]],
        [SamplingParams(temperature=0, **params)],
        history=[prompt + generated + [3] * 5],  # what lies beyond the length does not count
        lengths=[7],
        prompt_lens=[4],
    )
    assert got == [expected]


def test_repetition_penalty_lowers_negative_logits_too():
    got = sample_rows(
        [[-1.0, -1.5, -9.0]],
        [SamplingParams(temperature=0, repetition_penalty=2.0)],
        history=[[0]],
        lengths=[1],
    )
    assert got == [1]


@pytest.mark.parametrize("C", [1, 255, 256, 257, 700])
def test_counts_are_those_of_numpy(rng, C):
    B, V = 5, 37
    tokens = rng.integers(0, V, (B, C))
    starts = rng.integers(0, C, B)
    ends = np.minimum(starts + rng.integers(0, C + 1, B), C)
    slots = rng.permutation(B)
    arguments = (jnp.asarray(a, jnp.int32) for a in (tokens, slots, starts, ends))
    got = jax.jit(lambda *a: count_tokens(tokens_between(*a), V))(*arguments)
    for row in range(B):
        expected = np.bincount(tokens[slots[row], starts[row] : ends[row]], minlength=V)
        np.testing.assert_array_equal(got[row], expected)


def test_adjustments_hold_no_loop():
    """One would keep the whole step out of a CUDA graph, asked for or not."""
    logits, state = jnp.zeros((2, 50)), state_of([SamplingParams()] * 2)
    zeros = jnp.zeros(2, jnp.int32)
    jaxpr = str(jax.make_jaxpr(adjust)(logits, state, jnp.zeros((2, 9), jnp.int32), zeros, zeros))
    assert "cond[" in jaxpr and "while[" not in jaxpr and "scan[" not in jaxpr


def test_ids_that_stop_are_banned_until_enough_tokens_are_out():
    logits = np.tile([9.0, 8.0, 1.0], (4, 1))
    params = [SamplingParams(temperature=0, min_new_tokens=m) for m in (0, 2, 3, 3)]
    got = sample_rows(
        logits, params, history=np.zeros((4, 9)), lengths=[7, 7, 7, 8], prompt_lens=same(5, 4),
        stop_ids=(0, 1),
    )  # fmt: skip
    assert got.tolist() == [0, 0, 2, 0]


def test_biases_are_added_before_the_argmax():
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logit_bias={"2": 3.5}),
        SamplingParams(temperature=0, logit_bias={0: -100, 1: -100.0}),
    ]
    assert sample_rows(np.tile([3.0, 2.0, 0.0], (3, 1)), params).tolist() == [0, 2, 2]


# Filters


@pytest.mark.parametrize(
    "params, kept",
    [
        (dict(), [1, 1, 1, 1]),
        (dict(top_k=1), [1, 0, 0, 0]),
        (dict(top_k=3), [1, 1, 1, 0]),
        (dict(top_k=4), [1, 1, 1, 1]),
        (dict(top_k=1000), [1, 1, 1, 1]),
        (dict(top_p=0.3), [1, 0, 0, 0]),
        (dict(top_p=0.45), [1, 1, 0, 0]),
        (dict(top_p=0.75), [1, 1, 1, 0]),
        (dict(top_p=0.95), [1, 1, 1, 1]),
        (dict(min_p=0.15), [1, 1, 1, 1]),
        (dict(min_p=0.3), [1, 1, 1, 0]),
        (dict(min_p=0.8), [1, 0, 0, 0]),
        (dict(min_p=1.0), [1, 0, 0, 0]),
        (dict(top_k=3, top_p=0.45), [1, 1, 0, 0]),
        (dict(top_k=2, top_p=0.75), [1, 1, 0, 0]),
        (dict(top_k=3, top_p=0.95, min_p=0.6), [1, 1, 0, 0]),
        (dict(temperature=1e-3, top_p=0.99), [1, 0, 0, 0]),
        (dict(temperature=1e6, top_p=0.6), [1, 1, 1, 0]),
    ],
)
def test_filters_keep_what_they_should(params, kept):
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(kept_rows(logits, [SamplingParams(**params)])[0], np.bool_(kept))


@pytest.mark.parametrize("top", [0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 1e30, -1e30])
def test_filters_are_exact_around_zero_and_at_extremes(top):
    logits = np.array([[top, top - max(1, abs(top) / 2), -np.inf]], np.float32)
    for params in (SamplingParams(top_k=1), SamplingParams(min_p=1), SamplingParams(top_p=1e-3)):
        assert kept_rows(logits, [params]).tolist() == [[True, False, False]]


def test_ties_with_the_last_kept_token_are_kept():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_k=4), SamplingParams(top_p=0.5)):
        assert kept_rows(logits, [params]).tolist() == [[1, 1, 1, 1, 0]]
    assert kept_rows(np.zeros((1, 7)), [SamplingParams(top_k=1, top_p=0.01)]).all()


def test_neighbouring_floats_are_told_apart():
    logits = np.array([[1, 0, 0, 0]], np.float32)
    for token in range(1, 4):
        logits[0, token] = np.nextafter(logits[0, token - 1], np.float32(-np.inf))
    for k in range(1, 5):
        assert kept_rows(logits, [SamplingParams(top_k=k)]).sum() == k


@pytest.mark.parametrize("V", [1, 2, 3, 97, 1021])
def test_filters_equal_the_sorting_oracle_on_mixed_batches(rng, V):
    B = 24
    logits = (rng.standard_normal((B, V)) * rng.choice([0.1, 1, 5], (B, 1))).astype(np.float32)
    params = [
        SamplingParams(
            temperature=rng.choice([0.3, 1.0, 2.5]),
            top_k=int(rng.choice([-1, 1, 2, 40, V])),
            top_p=rng.choice([1.0, 0.999, 0.9, 0.31]),
            min_p=rng.choice([0.0, 0.02, 0.4]),
        )
        for _ in range(B)
    ]
    kept = kept_rows(logits, params)
    for row, one in enumerate(params):
        expected = kept_exact(
            logits[row],
            temperature=one.temperature,
            top_k=None if one.top_k == -1 else one.top_k,
            top_p=one.top_p,
            min_p=one.min_p,
        )
        np.testing.assert_array_equal(kept[row], expected, err_msg=f"row {row}: {one}")


def test_the_vocabulary_is_never_sorted():
    state = state_of([SamplingParams()] * 2)
    jaxpr = jax.make_jaxpr(run)(
        jnp.zeros((2, 50)), state, jnp.zeros((2, 9), jnp.int32), jnp.zeros(2, jnp.int32)
    )
    used = set(re.findall(r"\w+(?=\[)", str(jaxpr)))
    assert {"while", "cond", "argmax"} <= used
    assert not {name for name in used if "sort" in name or "top_k" in name}


# The draw


@pytest.mark.parametrize(
    "params",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=4),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(temperature=1.7, top_k=5, top_p=0.8, min_p=0.1),
    ],
)
def test_frequencies_are_those_of_the_exact_distribution(params):
    probs = np.array([0.3, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
    exact = sampling_probs_exact(np.log(probs), **params)
    count = 8000
    observed = draw_many(probs, count, **params) * count
    assert not observed[exact == 0].any()
    kept = exact > 0
    assert stats.chisquare(observed[kept], exact[kept] * count).pvalue > 1e-3


def test_noise_is_gumbel_distributed_in_its_tail_too():
    key = jnp.uint32(1), jnp.uint32(2)
    noise = -jnp.log(noises.exponential(key, jnp.arange(2_000_003), noises.OF_GROUPS))
    assert np.isfinite(noise).all()
    assert stats.kstest(np.asarray(noise), stats.gumbel_r.cdf).pvalue > 1e-3
    above = (np.asarray(noise) > 11).sum()  # about 33 of 2 million
    assert stats.poisson.sf(above - 1, 2_000_003 * stats.gumbel_r.sf(11)) > 1e-3
    assert stats.poisson.cdf(above, 2_000_003 * stats.gumbel_r.sf(11)) > 1e-3


def test_words_are_those_of_threefry_2x32(rng):
    """JAX has an implementation of its own."""
    key, counters = (jnp.asarray(rng.integers(0, 2**32, n), jnp.uint32) for n in (2, 2002))
    ours = noises.threefry2x32((key[0], key[1]), (counters[:1001], counters[1001:]))
    np.testing.assert_array_equal(jnp.concatenate(ours), threefry_2x32(key, counters))


@pytest.mark.parametrize("varied", ["seed's high word", "seed's low word", "position", "attempt"])
def test_both_words_of_successive_keys_and_their_noise_are_independent(varied):
    """Neighbouring inputs, the bits of one word, the two words, and word and noise."""
    zero, many = jnp.zeros(2**16, jnp.uint32), jnp.arange(2**16, dtype=jnp.uint32)
    high, low, position, attempt = (
        many if name == varied else zero
        for name in ("seed's high word", "seed's low word", "position", "attempt")
    )
    words = noises.attempt_key((high, low), position, attempt)
    of_groups, of_tokens = (noises.exponential(words, zero, p) for p in (0, 1))
    uniform = [np.asarray(word) / 2**32 for word in words]
    uniform += [1 - np.exp(-np.asarray(noise)) for noise in (of_groups, of_tokens)]
    low_bits = (np.asarray(words[0]) & 0xFFFF) / 2**16
    for a, b in [*itertools.combinations(uniform, 2), (uniform[0], low_bits)]:
        assert_independent(a, b)
    for a in uniform:
        assert_independent(a[:-1], a[1:])


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """Of two uniform variables."""
    pairs, _, _ = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize("params", [dict(), dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)])
def test_frequencies_over_several_groups_are_exact(rng, varied, params):
    """Of tokens that share a group and of tokens that do not, at any seed and any position."""
    V, count = 37, 20000
    logits = rng.standard_normal(V).astype(np.float32) * 1.5
    exact = sampling_probs_exact(logits, **params)
    state = state_of([SamplingParams(**params)])
    state = SamplingState(*(jnp.repeat(field, count, axis=0) for field in state))
    many = jnp.arange(count, dtype=jnp.int32)
    if varied == "seed":
        state = state._replace(seed=state.seed.at[:, 1].set(many.astype(jnp.uint32)))
    positions = many if varied == "position" else jnp.full(count, 5, jnp.int32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, V))
    tokens = np.asarray(jax.jit(draw)(rows, state, positions))
    observed, kept = np.bincount(tokens, minlength=V), exact > 0
    assert not observed[~kept].any()
    assert stats.chisquare(observed[kept], exact[kept] * count).pvalue > 1e-3


def test_a_token_of_tiny_probability_gets_its_due():
    """One token of 2**-18, among tokens of its own group and of others."""
    count, V = 2**20, 17
    logits = jnp.zeros(V).at[3].set(np.log(2.0**-18 * (V - 1)))
    state = empty_state(1, 1, 1)._replace(temperature=jnp.ones(1))
    once = jax.jit(
        lambda positions: jax.lax.map(
            lambda position: draw(logits[None], state, position[None])[0] == 3,
            positions,
            batch_size=4096,
        ).sum()
    )
    drawn = int(once(jnp.arange(count, dtype=jnp.int32)))
    assert stats.poisson.sf(drawn - 1, 4) > 1e-3 and stats.poisson.cdf(drawn, 4) > 1e-3


def test_a_draw_depends_on_seed_and_position_only(rng):
    B, V = 16, 503
    logits = rng.standard_normal((B, V))
    params = [
        SamplingParams(
            temperature=1.5, top_p=rng.choice([1.0, 0.9]), top_k=int(rng.choice([-1, 99]))
        )
        for _ in range(B)
    ]
    seeds, lengths = rng.integers(-(2**63), 2**63, B), rng.integers(0, 9, B)
    whole = sample_rows(logits, params, seeds=seeds.tolist(), lengths=lengths)
    order = rng.permutation(B)
    for some in (order, order[:5], order[:1]):
        again = sample_rows(
            logits[some],
            [params[row] for row in some],
            seeds=[int(seeds[row]) for row in some],
            lengths=lengths[some],
        )
        np.testing.assert_array_equal(again, whole[some])
    other_place = sample_rows(logits, params, seeds=seeds.tolist(), lengths=lengths + 1)
    other_seed = sample_rows(logits, params, seeds=(seeds ^ 2**40).tolist(), lengths=lengths)
    assert (other_place != whole).any() and (other_seed != whole).any()


def test_rows_of_equal_seed_and_distinct_positions_are_independent():
    """The joint frequencies of successive tokens are the products of the single ones."""
    count, probs = 20000, np.array([0.5, 0.3, 0.2])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (count, 3))
    state = state_of([SamplingParams()])
    state = SamplingState(*(jnp.repeat(field, count, axis=0) for field in state))
    tokens = run(
        logits, state, jnp.zeros((count, 1), jnp.int32), jnp.arange(count, dtype=jnp.int32)
    )
    tokens = np.asarray(tokens)
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (tokens[::2], tokens[1::2]), 1)
    expected = np.outer(probs, probs) * pairs.sum()
    assert stats.chisquare(pairs.ravel(), expected.ravel()).pvalue > 1e-3


# Bad logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_without_a_usable_distribution_gives_minus_one(rng, bad, temperature):
    logits = rng.standard_normal((5, 33))
    params = [SamplingParams(temperature=temperature, top_p=0.9)] * 5
    good = sample_rows(logits, params)
    logits[1, 5] = bad
    logits[3] = -np.inf
    got = sample_rows(logits, params)
    assert got[1] == got[3] == -1
    np.testing.assert_array_equal(got[[0, 2, 4]], good[[0, 2, 4]])


def test_minus_infinity_is_never_drawn():
    logits = np.full((64, 9), -np.inf)
    logits[:, 4] = -1e4
    assert (sample_rows(logits, [SamplingParams(temperature=100.0)] * 64) == 4).all()


def test_softmax_oracle_is_a_distribution(rng):
    np.testing.assert_allclose(softmax_exact(rng.standard_normal((3, 9))).sum(axis=1), 1)
