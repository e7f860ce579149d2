"""What the Triton attention kernels share: blocks of arrays, products, and the way from a token's
position to its place in the paged cache. All of it is called inside kernels."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
HEAD_SIZES = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)


def first_token(kv_len: Any, window: int | None, align: int) -> Any:
    """Where a row begins. What the window has left behind may be gone, but not part of a page."""
    return jnp.maximum(kv_len - (window or kv_len), 0) // align * align


def pages_at(table_ref: Any, row: Any, position: Any, step: int, page_size: int) -> tuple[Any, ...]:
    """Ids of the pages of `step` tokens from a position on; the table's last one past its end."""
    first, last = position // page_size, table_ref.shape[1] - 1
    pages = range(max(1, step // page_size))
    return tuple(table_ref[row, jnp.minimum(first + i, last)] for i in pages)


def rows_of_k(pages: tuple[Any, ...], tokens: Any, kv_head: Any, K: int, page_size: int) -> Any:
    """Where K of adjacent tokens of these pages lies in a cache of rows of `H`."""
    page, nth = jnp.full_like(tokens, pages[0]), jnp.arange(tokens.size, dtype=jnp.int32)
    for i in range(1, len(pages)):
        page = jnp.where(nth // page_size == i, pages[i], page)
    return (page * (2 * K) + kv_head) * page_size + tokens % page_size


def dot(a: Any, b: Any, b_axis: int) -> Any:
    """Float32 product over the last axis of `a`, of float32 exactly and not in TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), precision, preferred_element_type=jnp.float32
    )


def load_block(place: tuple, index: tuple, mask: Any, other: float = 0) -> Any:
    """A block of an array at scalar and then array indices, `other` where masked."""
    ref, *scalars = place
    index = tuple(jnp.broadcast_to(i, mask.shape) for i in index)
    return pltriton.load(ref.at[(*scalars, *index)], mask=mask, other=other)


def store_block(place: tuple, index: tuple, mask: Any, value: Any) -> None:
    """The unmasked values to the same places."""
    ref, *scalars = place
    index = tuple(jnp.broadcast_to(i, mask.shape) for i in index)
    pltriton.store(ref.at[(*scalars, *index)], value.astype(ref.dtype), mask=mask)


def unsupported_arrays(*, head_size: int, page_size: int, dtype: str) -> str | None:
    """Why neither kernel can use these arrays; None if they can."""
    if head_size not in HEAD_SIZES:
        return f"its head sizes are {HEAD_SIZES}, not {head_size}"
    if page_size not in PAGE_SIZES:
        return f"its page sizes are {PAGE_SIZES}, not {page_size}"
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    return None
