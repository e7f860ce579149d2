"""Exact values in NumPy float64, and the tolerance that everything numerical is held to: an error
of at most twice that of the naive computation in the same dtype, in the maximum and in the rms."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

PERIOD = 999_983  # a prime

OPTIMIZED: dict[str, Any] = {"xla_backend_optimization_level": 3}
"""Compiler options of what runs longer than it compiles; see `conftest`."""


def assert_near_exact(
    got: Any, exact: np.ndarray, naive: Any, *, rows: Sequence[str] | None = None
) -> None:
    """Fails unless max and rms error of `got` are at most twice those of `naive`, plus half an ulp.

    `exact` is float64. The dtype of `got` sets the ulp; it is taken at the largest exact value for
    the max error and at the root mean square for the rms error. With `rows`, what the entries of
    the first axis are called: each is scaled to the same size first, so that none hides behind a
    larger one, and the worst is named.
    """
    __tracebackhide__ = True
    if exact.dtype != np.float64:
        raise TypeError(
            f"exact: expected float64 (anything less bounds nothing), got {exact.dtype}"
        )
    if got.shape != exact.shape or naive.shape != exact.shape:
        raise AssertionError(f"shapes: got {got.shape}, naive {naive.shape}, exact {exact.shape}")
    if exact.size == 0:
        return
    half_ulp = float(jnp.finfo(got.dtype).eps) / 2
    got, naive, worst = to_float64(got), to_float64(naive), ""
    if rows is not None:
        sizes = np.sqrt(np.square(exact).mean(axis=tuple(range(1, exact.ndim)), keepdims=True))
        got, naive, exact = (a / np.where(sizes == 0, 1, sizes) for a in (got, naive, exact))
        errors = np.abs(got - exact).reshape(len(exact), -1).max(axis=1)
        worst = f"; worst is {rows[int(errors.argmax())]}"
    for name, norm in (("max", _max), ("rms", _rms)):
        bound = 2 * norm(naive - exact) + half_ulp * norm(exact)
        error = norm(got - exact)
        assert error <= bound, f"{name} error {error:.3e} exceeds {bound:.3e}{worst}"


def to_float64(array: Any) -> np.ndarray:
    """A float64 copy of a JAX or NumPy array, bfloat16 included."""
    return np.asarray(array).astype(np.float64)


def noise(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0
) -> np.ndarray:
    """Normal numbers, the same again after `PERIOD`: drawing takes longer than all the rest."""
    drawn = rng.standard_normal(min(PERIOD, int(np.prod(shape)))) * scale
    return np.resize(drawn.astype(dtype), shape)


def attention_exact(q: Any, k: Any, v: Any, **how: Any) -> np.ndarray:
    """Causal attention of one sequence: k and v [S K H] are all its tokens, q [T N H] the last, or
    those at `positions`. `how` as in `_attention`."""
    return _attention(*(to_float64(a) for a in (q, k, v)), **how, rounded=lambda a: a)


def attention_naive(q: Any, k: Any, v: Any, **how: Any) -> np.ndarray:
    """By the textbook formula in the dtype of its inputs, with float32 sums and softmax."""
    dtype = q.dtype
    rounded = lambda a: a.astype(dtype).astype(np.float32)
    wide = (np.asarray(a).astype(np.float32) for a in (q, k, v))
    return _attention(*wide, **how, rounded=rounded).astype(dtype)


def _attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    rounded: Callable[[np.ndarray], np.ndarray],
    window: int | None = None,
    soft_cap: float | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """One product for each kv head: q as [K G*T H], and `np.matmul` leaves it to BLAS."""
    (T, N, H), (S, K, _) = q.shape, k.shape
    if S == 0:
        return np.zeros_like(q)
    positions = np.arange(S - T, S) if positions is None else positions
    q = q.reshape(T, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, -1, H)
    scores = (q @ k.transpose(1, 2, 0)).reshape(N, T, S) * q.dtype.type(scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(_seen(positions, S, window), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = rounded(weights / weights.sum(axis=-1, keepdims=True))
    out = weights.reshape(K, -1, S) @ v.transpose(1, 0, 2)
    return rounded(out.reshape(N, T, H).transpose(1, 0, 2))


def _seen(positions: np.ndarray, S: int, window: int | None) -> np.ndarray:
    """[T S]: which of `S` tokens those at `positions` see; `window` counts the token itself."""
    query, key = positions[:, None], np.arange(S)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def softmax_exact(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64; -inf has probability zero."""
    logits = to_float64(logits)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kept_exact(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """[V]: which tokens of one row survive the filters, by sorting; ties share one fate."""
    logits = to_float64(logits)
    probs = softmax_exact(logits / temperature)
    order = np.argsort(-logits, kind="stable")
    first = np.searchsorted(-logits[order], -logits[order], side="left")  # of those tied with it
    mass_above = np.concatenate([[0.0], np.cumsum(probs[order])])[first]
    kept = np.ones(len(logits), bool)
    if top_p < 1:
        kept &= mass_above <= top_p
    if top_k is not None:
        kept &= first < top_k
    result = np.zeros(len(logits), bool)
    result[order] = kept
    return result & (probs >= min_p * probs.max())


def sampling_probs_exact(logits: np.ndarray, *, temperature: float = 1.0, **filters) -> np.ndarray:
    """[V]: the distribution that one row is sampled from, in float64."""
    kept = kept_exact(logits, temperature=temperature, **filters)
    return softmax_exact(np.where(kept, to_float64(logits) / temperature, -np.inf))


def _max(error: np.ndarray) -> float:
    return float(np.abs(error).max())


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error))))
