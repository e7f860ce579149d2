"""Attention of prompts, whole or in chunks, over a paged KV cache, on Hopper's tensor cores.

    out[t] = sum_s softmax_s(scale q[t] k[s]) v[s]   over position(t) - window < s <= position(t)

Each row's query tokens are cut into tiles of 128 queries: 64 tokens of two query heads that share
K and V, or 128 tokens of one head where the heads of a kv head are odd in number. A tile has tokens
of one row only: nothing one request leaves in the cache, NaN included, can reach another. As
many blocks as the GPU has multiprocessors walk over the list of tiles, which is made on the device
(`ragged_extend_tiles`): how the tokens of a batch fall into rows is a run-time value and costs
nothing. A block is three warpgroups: a producer, which copies pages to shared memory, and two
consumers, which take turns at the tensor cores (`ragged_extend_producer`, `..._consumer`).

Work: 4 T S H FLOP a query head, half of it for whole prompts. Bytes: q and out once; K and V once a
tile, from the L2 cache nearly always, as tiles that share them run side by side.

Source: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608 (specialised warpgroups that take
turns); paged cache, Kwon et al. 2023, arXiv:2309.06180. The reference is `paged_attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.lowered_once import LONGEST, lowered_once
from jaxengine.pallas_kernels.mosaic import warpgroup_kernel
from jaxengine.pallas_kernels.ragged_extend_consumer import Consumer
from jaxengine.pallas_kernels.ragged_extend_producer import (
    CONSUMERS,
    M,
    Refs,
    Shape,
    for_each_tile,
    produce_all,
)
from jaxengine.pallas_kernels.ragged_extend_products import INTERPRETED, TENSOR_CORES
from jaxengine.pallas_kernels.ragged_extend_tiles import cut_into_tiles

FORMATS = ("bfloat16", "float16")
HEAD_SIZES = (64, 128, 256)  # TMA stores rows of whole 128 bytes only, however many
PAGE_SIZES = (16, 32, 64, 128, 256)
SHARED_MEMORY = 227 * 1024  # bytes that a block may have
RESERVED = 1024  # of them for barriers


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    keys: int = 128  # a step: 64, 128 or 256
    stages: int = 2  # steps of K and V in shared memory
    own_output: bool = True  # the output does not reuse the memory of the queries
    blocks: int = 132  # the multiprocessors of an H100 or H200
    section_bytes: int = 2**26  # of K and V that are worked on at a time, about an L2 cache


def config_for(head_size: int) -> Config:
    """What fits into registers and shared memory."""
    return Config() if head_size <= 128 else Config(keys=64, own_output=False)


def ragged_extend(
    q: Float[Array, "T N H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    query_starts: Int[Array, " B"],
    query_lens: Int[Array, " B"],
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    min_query_len: int = 1,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Causal attention of the rows of `min_query_len` query tokens or more to their cached K and V.

    As `paged_attention`, but the tokens of other rows, and padding, get zeros. With a `soft_cap`,
    scores are `soft_cap * tanh(score / soft_cap)`. `T` is a multiple of 64.

    Raises:
        ValueError: a shape, dtype or config that the kernel is not made for.
    """
    (T, N, H), (_, _, K, page_size, _) = q.shape, cache.shape
    config = config_for(H) if config is None else config
    reason = unsupported(
        head_size=H, group_size=N // K, page_size=page_size, dtype=q.dtype, config=config
    )
    if q.dtype != cache.dtype:
        reason = f"expected q and cache of one dtype, got {q.dtype} and {cache.dtype}"
    elif T % M or N % K or min(scale, 1.0 if soft_cap is None else soft_cap) <= 0:
        reason = (
            f"expected T a multiple of {M}, N of K, and a positive scale and soft cap; got "
            f"T={T}, N={N}, K={K}, scale={scale}, soft_cap={soft_cap}"
        )
    if reason is not None:
        raise ValueError(f"ragged_extend: {reason}")
    heads = 2 if N // K % 2 == 0 else 1
    tiles, num_tiles = cut_into_tiles(
        query_starts,
        query_lens,
        kv_lens,
        num_tokens=T,
        size=CONSUMERS * M // heads,
        keys=config.keys,
        window=window,
        min_query_len=min_query_len,
        section=max(config.section_bytes // (2 * K * H * q.dtype.itemsize), 1),
    )
    shape = Shape(
        N=N,
        K=K,
        H=H,
        page_size=page_size,
        heads=heads,
        keys=config.keys,
        stages=config.stages,
        own_output=config.own_output or interpret,
        blocks=config.blocks,
        dtype=q.dtype,
        scale=float(scale),
        window=window,
        soft_cap=soft_cap,
    )
    # Flat, since TMA knows 5 dimensions at most, those of its tiles included.
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    kernel = lowered_once(_kernel, shape, results=results, length=LONGEST, interpret=interpret)
    num_tokens = jnp.full(1, T, jnp.int32)
    (out,) = kernel(tiles, num_tiles, num_tokens, page_table, q, cache.reshape(-1, H))
    return out


def _kernel(
    shape: Shape, results: tuple[jax.ShapeDtypeStruct], interpret: bool
) -> Callable[..., tuple[jax.Array]]:
    """The call (tiles, num_tiles, num_tokens, page_table, q, cache) -> out."""
    swizzle = plgpu.SwizzleTransform(128)
    by_8, by_1 = ((plgpu.TilingTransform((rows, 64)), swizzle) for rows in (8, 1))
    queries = plgpu.SMEM((CONSUMERS, M, shape.H), shape.dtype, transforms=by_8)
    columns = min(shape.H, 128)  # more of them, and threads would contend for banks of memory
    outputs = (CONSUMERS, shape.H // columns, M, columns)
    outputs = plgpu.SMEM(outputs, shape.dtype, transforms=by_1)  # to be read from any row on
    ring = plgpu.SMEM((shape.stages, shape.keys, shape.H), shape.dtype, transforms=by_8)
    each = plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS)
    full = plgpu.Barrier(num_arrivals=shape.keys // shape.copied, num_barriers=shape.stages)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=shape.stages)
    both = [queries, outputs] if shape.own_output else [plgpu.RefUnion(queries, outputs)]

    def body(*refs: Any) -> None:
        given, own = refs[:7], list(refs[7:])
        if not shape.own_output:
            own[:1] = own[0]
        _run_warpgroup(shape, Refs(*given, *own), interpret)

    return warpgroup_kernel(
        body,
        results=results,
        scratch=[*both, ring, ring, each, each, full, free, full, free, each],
        num_blocks=shape.blocks,
        num_warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )


def _run_warpgroup(shape: Shape, refs: Refs, interpret: bool) -> None:
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    products = INTERPRETED if interpret else TENSOR_CORES

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        consumer = Consumer(shape, refs, products, warpgroup)
        pl.when(warpgroup == 1)(consumer.end_turn)  # the first turn is that of 0
        for_each_tile(shape, refs, block, consumer.attend)
        pl.when(warpgroup == 0)(consumer.wait_for_turn)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        produce_all(shape, refs, block)


def unsupported(
    *,
    head_size: int,
    group_size: int,
    page_size: int,
    dtype: Any,
    config: Config | None = None,
) -> str | None:
    """Why the kernel cannot be used; None where it can. Any `group_size` will do."""
    config = config_for(head_size) if config is None else config
    if (name := jnp.dtype(dtype).name) not in FORMATS:
        return f"it multiplies {' or '.join(FORMATS)} on tensor cores, not {name}"
    if head_size not in HEAD_SIZES:
        return f"it needs a head size of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    if page_size not in PAGE_SIZES:
        return f"it needs a page size of {', '.join(map(str, PAGE_SIZES))}, not {page_size}"
    if config.keys not in (64, 128, 256):
        return f"keys: expected 64, 128 or 256, got {config.keys}"
    queries, pages = CONSUMERS * M * (1 + config.own_output), 2 * config.stages * config.keys
    used = 2 * head_size * (queries + pages) + RESERVED
    if used > SHARED_MEMORY:
        return f"{config} needs {used} bytes of shared memory, of {SHARED_MEMORY}"
    return None


SHAPES = {
    "llama-8b": dict(N=32, K=8, H=128, page_size=64),
    "qwen3-0.6b": dict(N=16, K=8, H=128, page_size=64),
    "qwen2.5-0.5b": dict(N=14, K=2, H=64, page_size=64),
    "gemma": dict(N=8, K=4, H=256, page_size=64),
    "olmo": dict(N=16, K=16, H=128, page_size=64),
    "small pages": dict(N=32, K=8, H=128, page_size=16),
    "large pages": dict(N=32, K=8, H=128, page_size=256),
}
"""The shapes of models, for test and benchmark alike."""
