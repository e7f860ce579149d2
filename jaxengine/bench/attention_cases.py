"""What attention kernels are timed on: rows of equal length over shuffled pages."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.bench.case import DTYPE, Case, sizes
from jaxengine.bench.floors import Work
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.rotate_and_write import rotate_and_write

EXTENDS = ((8, 1024, 1024), (2, 4096, 4096), (8, 1024, 8192))  # rows, query tokens, context of each


def decode_cases(name: str, module: ModuleType) -> Iterator[Case]:
    for title, shape in module.SHAPES.items():
        of = sizes(shape)
        B, N, K, H, length = of["B"], of["N"], of["K"], of["H"], of["kv_len"]
        rows, lens = np.arange(B, dtype=np.int32), np.full(B, length, np.int32)
        paged = _pages(B, length, of["page_size"])
        known: dict[str, Any] = dict(kv_lens=lens, page_table=paged, scale=H**-0.5, window=None)
        ragged = dict(rows=rows, positions=lens - 1, query_starts=rows, query_lens=lens * 0 + 1)
        yield Case(
            kernel=name,
            shape=title,
            make=partial(_attention_arguments, B, N, K, H, of["page_size"], paged),
            variants={
                "kernel": partial(_attend, module.paged_decode, known),
                "xla": partial(_attend, paged_attention, known | ragged),
            },
            work=_attention_work(N, K, H, pairs=B * length, kv_tokens=B * length, queries=B),
        )
        fused = getattr(module, "rotate_write_and_decode", None)
        if fused is not None and module.unsupported_fused(H) is None:
            yield Case(
                kernel=name,
                shape=f"{title}, with rotation",
                make=partial(_projected_arguments, B, N, K, H, of["page_size"], paged),
                variants={
                    "kernel": partial(_attend_projected, fused, known),
                    "apart": partial(_attend_projected, partial(_apart, module), known),
                },
                work=_attention_work(N, K, H, pairs=B * length, kv_tokens=B * length, queries=B),
                in_place=1,
            )


def extend_cases(name: str, module: ModuleType) -> Iterator[Case]:
    for title, shape in module.SHAPES.items():
        of = sizes(shape)
        if "query_len" in of:
            yield _one_extend(name, module, title, of)
            continue
        for B, length, context in EXTENDS:  # a model's heads, for any batch
            batch = dict(B=B, query_len=length, kv_len=context)
            yield _one_extend(name, module, f"{title} {B} x {length} of {context}", of | batch)


def _one_extend(name: str, module: ModuleType, title: str, of: Mapping[str, Any]) -> Case:
    N, K, H, B = of["N"], of["K"], of["H"], of["B"]
    length, context = of["query_len"], of["kv_len"]
    paged = _pages(B, context, of["page_size"])
    known: dict[str, Any] = dict(
        query_starts=np.arange(B, dtype=np.int32) * length,
        query_lens=np.full(B, length, np.int32),
        kv_lens=np.full(B, context, np.int32),
        page_table=paged,
        scale=H**-0.5,
        window=None,
    )
    ragged = dict(
        rows=np.repeat(np.arange(B, dtype=np.int32), length),
        positions=np.tile(np.arange(context - length, context, dtype=np.int32), B),
    )
    pairs = B * sum(range(context - length + 1, context + 1))
    return Case(
        kernel=name,
        shape=title,
        make=partial(_attention_arguments, B * length, N, K, H, of["page_size"], paged),
        variants={
            "kernel": partial(_attend, module.ragged_extend, known),
            "xla": partial(_attend, paged_attention, known | ragged),
        },
        work=_attention_work(N, K, H, pairs=pairs, kv_tokens=B * context, queries=B * length),
    )


def _attend(
    function: Callable[..., Any], batch: Mapping[str, Any], q: jax.Array, cache: jax.Array
) -> jax.Array:
    arrays = {
        name: jnp.array(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
    return function(q, cache, **arrays)


def _attend_projected(
    function: Callable[..., Any],
    batch: Mapping[str, Any],
    qkv: jax.Array,
    cache: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """With head norms; of the last token of each row."""
    lens, table, page_size = batch["kv_lens"], batch["page_table"], cache.shape[3]
    last, ones = lens - 1, jnp.ones(qkv.shape[3], qkv.dtype)
    places = dict(page_ids=table[np.arange(len(lens)), last // page_size], offsets=last % page_size)
    turn = dict(cos=cos, sin=sin, q_norm=ones, k_norm=ones, eps=1e-6)
    out, cache = _attend(function, {**places, **turn, **batch}, qkv, cache)
    return cache, out


def _apart(
    module: ModuleType,
    qkv: jax.Array,
    cache: jax.Array,
    *,
    kv_lens: jax.Array,
    page_table: jax.Array,
    scale: float,
    window: int | None,
    **turn: Any,
) -> tuple[jax.Array, jax.Array]:
    q, cache = rotate_and_write(qkv, cache, **turn)
    how: Any = dict(kv_lens=kv_lens, page_table=page_table, scale=scale, window=window)
    return module.paged_decode(q, cache, **how), cache


def _projected_arguments(
    B: int, N: int, K: int, H: int, page_size: int, paged: np.ndarray, key: jax.Array
) -> tuple[jax.Array, ...]:
    of_rest, of_qkv, of_cos, of_sin = jax.random.split(key, 4)
    _, cache = _attention_arguments(B, N, K, H, page_size, paged, of_rest)
    qkv = jax.random.normal(of_qkv, (B, K, N // K + 2, H), DTYPE)
    angles = (jax.random.normal(of, (B, H // 2), DTYPE) for of in (of_cos, of_sin))
    return qkv, cache, *angles


def _attention_arguments(
    T: int, N: int, K: int, H: int, page_size: int, paged: np.ndarray, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    of_q, of_cache = jax.random.split(key)
    pages = int(paged.max()) + 1
    q = jax.random.normal(of_q, (T, N, H), DTYPE)
    return q, jax.random.normal(of_cache, (pages, 2, K, page_size, H), DTYPE)


def _attention_work(N: int, K: int, H: int, *, pairs: int, kv_tokens: int, queries: int) -> Work:
    """K and V once, queries in and out; two products of each visible pair."""
    itemsize = jnp.dtype(DTYPE).itemsize
    return Work(itemsize * (2 * K * H * kv_tokens + 2 * N * H * queries), 4 * N * H * pairs)


def _pages(B: int, length: int, page_size: int) -> np.ndarray:
    """A page table of shuffled pages; page 0 is nobody's."""
    per_row = -(-length // page_size)
    ids = np.random.default_rng(0).permutation(B * per_row) + 1
    return ids.reshape(B, per_row).astype(np.int32)
