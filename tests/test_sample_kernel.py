"""The sampling kernel against the draw in plain XLA, token for token, and exact frequencies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import compile_ahead, lower_for_cuda
from numerics import OPTIMIZED, noise, sampling_probs_exact
from scipy import stats

from jaxengine.pallas_kernels.sample import SHAPES, Config, Shape, sample_rows, unsupported
from jaxengine.sampling import SamplingState, empty_state, sample
from jaxengine.sampling.sample import sample_rows as sample_rows_in_xla

NO_FILTER = dict(temperature=1.0, top_k=2**31 - 1, top_p=1.0, min_p=0.0)
SMALL = Config(part_groups=16, row_groups=32, max_parts=4)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def state_of(rows: list[dict], seed: int = 0) -> SamplingState:
    """Filters of each row, as in NO_FILTER where it has none; seeds at random."""
    rows = [NO_FILTER | row for row in rows]
    state = empty_state(len(rows), 1, 1)
    words = np.random.default_rng(seed).integers(0, 2**32, (len(rows), 2))
    return state._replace(
        seed=jnp.asarray(words, jnp.uint32),
        top_k=jnp.asarray([row["top_k"] for row in rows], jnp.int32),
        **{
            name: jnp.asarray([row[name] for row in rows], jnp.float32)
            for name in ("temperature", "top_p", "min_p")
        },
    )


def in_kernel(
    logits, state, positions, config: Config | None = None, interpret: bool = False
) -> jax.Array:
    return sample_rows(
        logits,
        temperature=state.temperature,
        top_k=state.top_k,
        top_p=state.top_p,
        min_p=state.min_p,
        seed=state.seed,
        positions=positions,
        config=config,
        interpret=interpret,
    )


# The kernel looks for a score that equals the largest. On a GPU it computes each once; interpreted,
# XLA may compute one twice, and LLVM rounds both alike only where it optimizes.
run = partial(
    jax.jit(
        in_kernel,
        static_argnames=("config", "interpret"),
        compiler_options=OPTIMIZED,
    ),
    config=SMALL,
    interpret=True,
)


def check(logits, rows: list[dict], *, seed: int = 0, **how) -> np.ndarray:
    """Both draws are the same."""
    logits, state = jnp.asarray(logits, jnp.float32), state_of(rows, seed)
    positions = jnp.arange(len(rows), dtype=jnp.int32) * 7 + seed
    expected = np.asarray(jax.jit(sample_rows_in_xla)(logits, state, positions))
    got = np.asarray(run(logits, state, positions, **how))
    np.testing.assert_array_equal(got, expected)
    return got


def random_rows(rng: np.random.Generator, B: int, V: int) -> list[dict]:
    """Every mix of filters, greedy rows among them."""
    return [
        dict(
            temperature=rng.choice([0.0, 0.3, 1.0, 2.5]),
            top_k=int(rng.choice([1, 2, 40, V, 2**31 - 1])),
            top_p=rng.choice([1e-3, 0.31, 0.9, 0.999, 1.0]),
            min_p=rng.choice([0.0, 0.02, 0.4]),
        )
        for _ in range(B)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_both_draws_agree_on_every_mix_of_filters(rng, seed):
    B, V = 40, 1021  # 64 groups of 16, some of them 15: 4 parts of one tile
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((B, V)) * rng.choice([0.1, 1, 5], (B, 1))
    check(logits, random_rows(rng, B, V), seed=seed)


def test_both_draws_agree_on_hostile_rows(rng):
    V = 1021
    plain = rng.standard_normal(V)
    ties = rng.integers(0, 3, V).astype(float)
    masked = np.where(rng.random(V) < 0.95, -np.inf, plain)
    one = np.full(V, -np.inf)
    one[777] = -5.0
    last = np.where(np.arange(V) == V - 1, 50.0, plain)
    kinds = [
        *(plain, ties, masked, one, last, np.zeros(V), plain + 1e4, plain * 1e30),
        np.where(np.arange(V) == 64, np.nan, plain),
        np.where(np.arange(V) == V - 1, np.inf, plain),
        np.full(V, -np.inf),
        np.full(V, np.nan),
    ]
    asks = [
        *(dict(temperature=0.0), dict(), dict(top_k=1), dict(top_p=1e-6), dict(top_k=3, top_p=0.5)),
        *(dict(min_p=1.0), dict(min_p=0.1, top_k=V - 1), dict(temperature=1e-6)),
        *(dict(temperature=1e30, top_p=0.7), dict(temperature=1e-6, top_p=0.7)),
    ]
    pairs = [(kind, ask) for kind in range(len(kinds)) for ask in asks]
    got = check([kinds[kind] for kind, _ in pairs], [ask for _, ask in pairs])
    for token, (kind, ask) in zip(got, pairs, strict=True):
        if kind >= 8:
            assert token == -1
        else:
            assert np.isfinite(kinds[kind][token])
            if ask in (dict(temperature=0.0), dict(temperature=1e-6)) and kind != 5:
                assert kinds[kind][token] == kinds[kind].max()
            if ask == dict(temperature=0.0):
                assert token == kinds[kind].argmax()


@pytest.mark.parametrize("B, V, config", [(1, 1, SMALL), (3, 17, SMALL), (2, 4099, None)])
def test_both_draws_agree_on_other_sizes(rng, B, V, config):
    """A single token; fewer tokens than a group has; the default tuning."""
    for seed in range(3):
        check(rng.standard_normal((B, V)), random_rows(rng, B, V), seed=seed, config=config)


def test_ties_go_to_the_first_token_whatever_part_it_is_in():
    V = 1021
    logits = np.zeros((40, V))
    for row, tokens in enumerate([(5, 9), (63, 64), (64, 900), (1020, 3), (960, 961), (0, 1)]):
        logits[row, list(tokens)] = 1.0
    got = check(logits, [dict(temperature=0.0)] * 40)
    assert got.tolist() == [5, 63, 64, 3, 960, 0] + [0] * 34


@pytest.mark.parametrize(
    "params", [dict(), dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05), dict(top_k=2)]
)
def test_frequencies_are_those_of_the_exact_distribution(rng, params):
    count, V = 4000, 37
    logits = (rng.standard_normal(V) * 1.5).astype(np.float32)
    exact = sampling_probs_exact(logits, **params)
    state = state_of([params] * count)
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, V))
    tokens = np.asarray(run(rows, state, jnp.arange(count, dtype=jnp.int32)))
    observed, kept = np.bincount(tokens, minlength=V), exact > 0
    assert not observed[~kept].any()
    assert stats.chisquare(observed[kept], exact[kept] * count).pvalue > 1e-3


def test_a_row_draws_the_same_in_any_batch(rng):
    """Also in one so large that rows are cut into fewer parts: into one instead of four."""
    V, config = 1021, Config(part_groups=16, row_groups=32, programs=12)
    logits = rng.standard_normal((12, V)).astype(np.float32)
    state = state_of(random_rows(rng, 12, V))
    positions = jnp.arange(12, dtype=jnp.int32)
    whole = np.asarray(run(jnp.asarray(logits), state, positions, config=config))
    some = np.array([7, 2])
    few = jax.tree.map(lambda field: field[some], (jnp.asarray(logits), state, positions))
    np.testing.assert_array_equal(run(*few, config=config), whole[some])


def test_sample_has_two_implementations():
    logits = jnp.asarray([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    for how in ("xla", "triton"):
        call = jax.jit(partial(sample, implementation=how, interpret=True))
        assert call(logits, empty_state(2, 1, 1), jnp.zeros(2, jnp.int32)).tolist() == [0, 1]


def test_each_part_has_something_to_do():
    for config in (Config(), SMALL):
        for B in (1, 2, 3, 8, 100, 128, 256, 1000):
            for V in (1, 17, 1021, 32000, 128256, 151936):
                Q = -(-V // 16)
                assert 1 <= config.parts(B, Q) <= -(-Q // config.part_groups)


def test_only_float32_is_taken():
    assert unsupported(dtype="float32") is None
    assert "bfloat16" in str(unsupported(dtype="bfloat16"))


def arguments(shape: Shape):
    B, V = shape
    return (
        jax.ShapeDtypeStruct((B, V), jnp.float32),
        jax.eval_shape(lambda: empty_state(B, 1, 1)),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_production_shapes_lower_to_triton(shape: Shape):
    assert "triton" in lower_for_cuda(in_kernel, *arguments(shape)).as_text()


ON_GPU = list(SHAPES.values())[::2]
"""Every number of rows, with one vocabulary or the other."""


@pytest.fixture(scope="module")
def compiled():
    calls = {"kernel": in_kernel, "xla": sample_rows_in_xla}
    return compile_ahead(
        {(name, s): (call, arguments(s)) for s in ON_GPU for name, call in calls.items()}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_both_draws_agree_on_a_gpu(rng, compiled, shape: Shape):
    """Up to rounding: a few rows may fall the other way in a thousand."""
    B, V = shape
    host = noise(rng, (B, V), np.float32) * rng.choice([1, 4], (B, 1)).astype(np.float32)
    is_hostile = B >= 8
    if is_hostile:
        host[0, 64], host[1, V - 1], host[2] = np.nan, np.inf, -np.inf
        host[3] = host[3].round()  # many of the largest
        host[4, rng.random(V) < 0.95] = -np.inf
    logits, positions, different = jnp.asarray(host), jnp.arange(B, dtype=jnp.int32), 0
    for seed in range(4):
        rows = random_rows(rng, B, V)
        rows[3 % B] |= dict(temperature=0.0)
        state = state_of(rows, seed)
        got, expected = (
            np.asarray(compiled[name, shape].result()(logits, state, positions))
            for name in ("kernel", "xla")
        )
        if is_hostile:
            assert (got[:3] == -1).all() and (got[3:] >= 0).all()
        for row in range(3 * is_hostile, B):
            assert np.isfinite(host[row, got[row]])
            if rows[row]["temperature"] == 0:
                assert got[row] == host[row].argmax(), f"row {row}"
        different += int((got != expected).sum())
    assert different <= 1 + B // 64
