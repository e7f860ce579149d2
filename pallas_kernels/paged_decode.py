"""Attention of one query token per row over its paged K and V: decoding, for Hopper.

    out[b, n] = sum_s w[s] v[s] / sum_s w[s],    w[s] = exp(scale q[b, n] . k[s] - peak)

It reads `2 * itemsize * K * H` bytes per token of context and does `2 G` operations per byte of
bfloat16, so memory is its limit: all `G` query heads of a kv head share one read, and K and V come
by the copy engine, a page of one head at a time, several tiles ahead of their use.

Hopper's tensor cores multiply at least 64 rows. Keys are those rows, queries the few columns:

    S' [tile C] = k q',    out' [H C] += v' P',    C = G rounded up to 8 or 16

so that little is padded, scores and sums fill a few registers, and two blocks fit on a core. The
columns past G hold whatever is there; no column meets another, and those are not written.

Where a step's rows are of as many sequences, nobody needs K and V of their tokens from the cache:
`rotate_write_and_decode` takes the projected queries, keys and values, and saves a launch a layer.

Work is shared out by a plan, see `paged_decode_plan`. A (row, kv head) done by one block is written
by it at once. One that is cut is finished by the block of its first tile: the others leave a mean
and the logarithm of its weight in global memory, and raise a counter for which that block waits.

Sources: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; parts of the context in
parallel, Dao et al. 2023, "Flash-Decoding for long-context inference"; copies by warps of their
own, Shah et al. 2024, "FlashAttention-3", arXiv:2407.08608. It is compared with `paged_attention`,
which shares nothing with it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.paged_decode_kernel import Config, attend
from jaxengine.pallas_kernels.paged_decode_plan import Plan
from jaxengine.pallas_kernels.paged_decode_triton import SHAPES as SHAPES

DTYPES = ("bfloat16", "float16")
HEAD_SIZES = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
MAX_GROUP = 16


def paged_decode(
    q: Float[Array, "B N H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    config: Config | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of the last token of each row to its `kv_len` cached tokens, itself included.

    With a `window`, to the last `window` of them; with a `soft_cap`, scores are
    `soft_cap * tanh(score / soft_cap)`. A row of length 0 gives zeros. Whatever else the cache
    holds, NaN included, has no effect. Products are of `q`'s dtype, scores and sums float32.

    The `plan` is that of `plan_for`, which is asked unless it is given; XLA makes equal plans once.
    Its counters are used by every call: of two calls with equal lengths in one program, one must
    depend on the result of the other, as those of layers do.

    `interpret` runs on a CPU, with plain operations in place of those that know a GPU's registers.
    """
    B, N, H = q.shape
    out, _ = attend(
        q.reshape(B * N, H),
        cache,
        {},
        num_heads=N,
        kv_lens=kv_lens,
        page_table=page_table,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        plan=plan,
        interpret=interpret,
    )
    return out


def rotate_write_and_decode(
    qkv: Float[Array, "B K G2 H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    cos: Float[Array, "B half_H"],
    sin: Float[Array, "B half_H"],
    page_ids: Int[Array, " B"],
    offsets: Int[Array, " B"],
    q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None,
    eps: float = 0.0,
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    config: Config | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "pages 2 K page_size H"]]:
    """`rotate_and_write` and `paged_decode` in one kernel: attention, and the cache with each row's
    K and V in its place; the same buffer if it is donated.

    Arguments are theirs, `page_ids` and `offsets` being those of the last token of each row. No row
    sees what another one writes: no two may be of one sequence. A row whose page id is `pages` or
    more writes nothing, but sees its own K and V all the same.
    """
    B, K, width, H = qkv.shape
    if reason := unsupported_fused(H):
        raise ValueError(f"rotate_write_and_decode: {reason}")
    pages = jnp.where(page_ids < len(cache), page_ids, -1)
    own = dict(cos=cos, sin=sin, offsets=offsets, q_norm=q_norm, k_norm=k_norm, page_ids=pages)
    out, new_cache = attend(
        qkv.reshape(-1, H),
        cache,
        {name: array for name, array in own.items() if array is not None},
        eps=float(eps),
        num_heads=K * (width - 2),
        kv_lens=kv_lens,
        page_table=page_table,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        plan=plan,
        interpret=interpret,
    )
    assert new_cache is not None
    if interpret:  # there it is another array, with nothing but what was written
        places = page_ids, slice(None), slice(None), offsets
        written = new_cache.at[places].get(mode="clip")
        new_cache = cache.at[places].set(written, mode="drop", unique_indices=True)
    return out, new_cache


def unsupported(*, head_size: int, group_size: int, page_size: int, dtype: Any) -> str | None:
    """Why these arrays cannot be used; None if they can."""
    if (name := getattr(dtype, "name", str(dtype))) not in DTYPES:
        return f"it multiplies {' or '.join(DTYPES)} on tensor cores, not {name}"
    if head_size not in HEAD_SIZES:
        return f"it needs a head size of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    if group_size > MAX_GROUP:
        return f"it takes up to {MAX_GROUP} query heads of one kv head, not {group_size}"
    if page_size not in PAGE_SIZES:
        return f"it needs a page size of {', '.join(map(str, PAGE_SIZES))}, not {page_size}"
    return None


def unsupported_fused(head_size: int) -> str | None:
    """Why queries cannot be prepared within the kernel, where it can be used; None if they can."""
    if head_size % 128:
        return f"it turns halves of heads in steps of 64 elements, which {head_size} has not"
    return None
