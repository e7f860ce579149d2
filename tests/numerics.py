"""Exact values in NumPy float64, and the tolerance that everything numerical is held to: an error
of at most twice that of the naive computation in the same dtype, in the maximum and in the rms."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def assert_near_exact(got: Any, exact: np.ndarray, naive: Any) -> None:
    """Fails unless max and rms error of `got` are at most twice those of `naive`, plus half an ulp.

    `exact` is float64. The dtype of `got` sets the ulp; it is taken at the largest exact value for
    the max error and at the root mean square for the rms error.
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
    for name, norm in (("max", _max), ("rms", _rms)):
        bound = 2 * norm(to_float64(naive) - exact) + half_ulp * norm(exact)
        error = norm(to_float64(got) - exact)
        assert error <= bound, f"{name} error {error:.3e} exceeds {bound:.3e}"


def to_float64(array: Any) -> np.ndarray:
    """A float64 copy of a JAX or NumPy array, bfloat16 included."""
    return np.asarray(array).astype(np.float64)


def attention_exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, window: int | None = None
) -> np.ndarray:
    """Causal attention of one sequence: k and v [S K H] are all its tokens, q [T N H] the last."""
    T, N, H = q.shape
    S, K, _ = k.shape
    q, k, v = (to_float64(a) for a in (q, k, v))
    k, v = (np.repeat(a, N // K, axis=1) for a in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) * scale
    scores = np.where(causal_mask(T, S, window), scores, -np.inf)
    return np.einsum("nts,snh->tnh", softmax_exact(scores), v)


def causal_mask(T: int, S: int, window: int | None = None) -> np.ndarray:
    """[T S]: which of `S` tokens the last `T` of them see; `window` counts the token itself."""
    query = np.arange(S - T, S)[:, None]
    key = np.arange(S)[None, :]
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
