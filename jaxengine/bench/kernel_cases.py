"""What each kernel is timed on: arguments for its `SHAPES`, the bytes and operations that a call
needs at least, and what else computes the same. One function a kernel; it times nothing."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.bench.attention_cases import decode_cases, extend_cases
from jaxengine.bench.case import DTYPE, Case, sizes
from jaxengine.bench.floors import Work
from jaxengine.pallas_kernels import few_row_linear
from jaxengine.sampling import empty_state
from jaxengine.sampling.sample import sample_rows

NUM_ROWS = {"few_row": (1, 2), "small_batch": (1, 8, 32, 64)}
NUM_TOKENS = (1, 32, 256, 8192)
MANY_ROWS = (128, 256, 1024, 8192)
PAGE, MAX_DECODE = 64, 512  # tokens of a page; so many tokens at most are rows of their own
SAMPLINGS: Mapping[str, Mapping[str, float]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


def cases(name: str, module: ModuleType) -> Iterator[Case]:
    """The cases of a kernel's module; none for one that is not known here."""
    if name in MAKERS:
        yield from MAKERS[name](name, module)


def _products(name: str, module: ModuleType) -> Iterator[Case]:
    kind = name.removesuffix("_linear")
    for model, products in module.SHAPES.items():
        for product, (M, F, D) in products.items():
            for B in NUM_ROWS[kind]:
                gated = M == 2
                kernel = getattr(module, f"{kind}_gated" if gated else name)
                reference = few_row_linear.linear_reference
                reference = few_row_linear.gated_reference if gated else reference
                has_norm = product in ("qkv", "gate_up")
                num_bytes = 2 * (M * F * D + B * D + B * F * (1 if has_norm else 2))
                yield Case(
                    kernel=name,
                    shape=f"{model} {product}, {B} rows",
                    make=partial(_product_arguments, M, B, F, D, has_norm),
                    variants={
                        "kernel": partial(_product, kernel, has_norm),
                        "xla": partial(_product, reference, has_norm),
                    },
                    work=Work(num_bytes, 2 * M * B * F * D),
                )


def _gates(name: str, module: ModuleType) -> Iterator[Case]:
    for model, (F, D) in module.SHAPES.items():
        for T in MANY_ROWS:
            yield Case(
                kernel=name,
                shape=f"{model}, {T} rows",
                make=partial(_two_arguments, 2, T, F, D),
                variants={
                    "kernel": module.many_row_gated,
                    "xla": few_row_linear.gated_reference,
                },
                work=Work(2 * (2 * F * D + T * D + T * F), 4 * T * F * D),
            )


def _normalizers(name: str, module: ModuleType) -> Iterator[Case]:
    for model, (V, D) in module.SHAPES.items():
        for T in MANY_ROWS:
            yield Case(
                kernel=name,
                shape=f"{model}, {T} tokens",
                make=partial(_two_arguments, 1, T, V, D),
                variants={
                    "kernel": partial(module.log_normalizer, num_rows=jnp.int32(T)),
                    "xla": module.reference,
                },
                work=Work(2 * (V * D + T * D) + 12 * T, 2 * T * V * D),
            )


def _two_arguments(M: int, T: int, F: int, D: int, key: jax.Array) -> tuple[jax.Array, ...]:
    return _product_arguments(M, T, F, D, True, key)[:2]


def _rotate(name: str, module: ModuleType) -> Iterator[Case]:
    """`SHAPES` count query heads per kv head as G."""
    for title, shape in module.SHAPES.items():
        of = sizes(shape)
        K, G, H = of["K"], of["G"], of["H"]
        for T in NUM_TOKENS:
            yield Case(
                kernel=name,
                shape=f"{title}, {T} tokens",
                make=partial(_rotation_arguments, T, K, G, H),
                variants={
                    "kernel": partial(_rotated, module.rotate_and_write),
                    "xla": partial(_rotated, module.reference),
                },
                work=Work(2 * T * K * (G + 2) * H * jnp.dtype(DTYPE).itemsize, 0),
                in_place=1,
            )


def _rotated(function: Callable[..., Any], qkv: Any, cache: Any, cos: Any, sin: Any) -> Any:
    """With head norms; tokens of one row, or each of a row of its own if there are few."""
    T, page_size = len(qkv), cache.shape[3]
    tokens = jnp.arange(T, dtype=jnp.int32)
    ones = jnp.ones(qkv.shape[3], qkv.dtype)
    q, cache = function(
        qkv,
        cache,
        cos=cos,
        sin=sin,
        page_ids=1 + (tokens if T <= MAX_DECODE else tokens // page_size),
        offsets=tokens % page_size,
        q_norm=ones,
        k_norm=ones,
        eps=1e-6,
    )
    return cache, q


def _rotation_arguments(T: int, K: int, G: int, H: int, key: jax.Array) -> tuple[Any, ...]:
    of_qkv, of_cos, of_sin = jax.random.split(key, 3)
    pages = 1 + (T if T <= MAX_DECODE else -(-T // PAGE))
    return (
        jax.random.normal(of_qkv, (T, K, G + 2, H), DTYPE),
        jnp.zeros((pages, 2, K, PAGE, H), DTYPE),
        jax.random.normal(of_cos, (T, H // 2), DTYPE),
        jax.random.normal(of_sin, (T, H // 2), DTYPE),
    )


def _sample(name: str, module: ModuleType) -> Iterator[Case]:
    for title, shape in module.SHAPES.items():
        of = sizes(shape)
        B, V = of["B"], of["V"]
        for drawn, values in SAMPLINGS.items():
            params = {field: np.full(B, value, np.float32) for field, value in values.items()}

            def kernel(logits: jax.Array, positions: jax.Array, params: Any = params) -> jax.Array:
                state = empty_state(len(logits), 1, 1)._replace(**jax.tree.map(jnp.array, params))
                fields = ("temperature", "top_k", "top_p", "min_p", "seed")
                known = {field: getattr(state, field) for field in fields}
                return module.sample_rows(logits, positions=positions, **known)

            def xla(logits: jax.Array, positions: jax.Array, params: Any = params) -> jax.Array:
                state = empty_state(len(logits), 1, 1)._replace(**jax.tree.map(jnp.array, params))
                return sample_rows(logits, state, positions)

            yield Case(
                kernel=name,
                shape=f"{title}, {drawn}",
                make=partial(_logits, B, V),
                variants={"kernel": kernel, "xla": xla},
                work=Work(4 * B * V, 2 * B * V),  # one pass over float32
            )


def _logits(B: int, V: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 3 * jax.random.normal(key, (B, V)), jnp.arange(B, dtype=jnp.int32)


def _product_arguments(
    M: int, B: int, F: int, D: int, has_norm: bool, key: jax.Array
) -> tuple[jax.Array, ...]:
    of_x, of_weight, of_rest = jax.random.split(key, 3)
    x = jax.random.normal(of_x, (B, D), DTYPE)
    weight = jax.random.normal(of_weight, (M, F, D) if M == 2 else (F, D), DTYPE)
    # The scale of the norm before, or the residual to be added.
    return x, weight, jax.random.normal(of_rest, (D,) if has_norm else (B, F), DTYPE)


def _product(
    function: Callable[..., Any], has_norm: bool, x: jax.Array, weight: jax.Array, rest: jax.Array
) -> jax.Array:
    if has_norm:
        return function(x, weight, norm_scale=rest, eps=1e-6)
    return function(x, weight, residual=rest)


MAKERS: dict[str, Callable[[str, ModuleType], Iterator[Case]]] = {
    "few_row_linear": _products,
    "log_normalizer": _normalizers,
    "many_row_gated": _gates,
    "paged_decode": decode_cases,
    "paged_decode_triton": decode_cases,
    "ragged_extend": extend_cases,
    "ragged_extend_triton": extend_cases,
    "rotate_and_write": _rotate,
    "sample": _sample,
    "small_batch_linear": _products,
}
