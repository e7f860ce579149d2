"""What stands between the QKV projection and attention, in one kernel: norms of query and key
heads, rotary embedding, and the write of keys and values into the paged cache.

    n = x / sqrt(mean x^2 + eps) * scale               of each query and key head, if it has norms
    (first, second) -> (first cos - second sin, second cos + first sin)      of the halves of each

Everything is float32 and rounded once, when it is stored. The cache is updated in place: each token
writes its own `2 K` rows of `H`, and the rest of the cache is neither read nor copied if the caller
donates it.

Bytes: `qkv` is read once, queries and the rows of the cache are written once: 2 T K (G+2) H times
the item size; 16 KB a token for 16 query and 8 kv heads of 128 in bfloat16. With few tokens it
takes what a launch takes. One program has one token and some of its kv heads, which makes the page
a scalar and every access whole rows.

Source: rotary embedding, Su et al. 2021, arXiv:2104.09864; RMSNorm, Zhang and Sennrich 2019,
arXiv:1910.07467; paged cache, Kwon et al. 2023, arXiv:2309.06180.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.paged_attention import write_kv
from jaxengine.pallas_kernels.pdl import launch_dependents

FEW_TOKENS = 64  # up to so many, a program takes one kv head: more programs, each done sooner
MANY_TOKENS = 8192  # up to so many, the kernel is the same


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    tile_K: int  # kv heads of a program, a power of two
    num_warps: int


class Shape(NamedTuple):
    """Of `qkv`, but that G counts the query heads alone."""

    T: int
    K: int
    G: int
    H: int


def reference(
    qkv: Float[Array, "T K G2 H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    cos: Float[Array, "T half_H"],
    sin: Float[Array, "T half_H"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None,
    eps: float = 0.0,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages 2 K page_size H"]]:
    """The same in plain XLA, each step rounded."""

    def turned(x: Array, scale: Array | None) -> Array:
        if scale is not None:
            wide = x.astype(jnp.float32)
            rms = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
            x = (wide / rms).astype(x.dtype) * scale[None, None]
        first, second = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    T, _, _, H = qkv.shape
    q, k, v = qkv[:, :, :-2].reshape(T, -1, H), qkv[:, :, -2], qkv[:, :, -1]
    return turned(q, q_norm), write_kv(cache, turned(k, k_norm), v, page_ids, offsets)


def rotate_and_write(
    qkv: Float[Array, "T K G2 H"],
    cache: Float[Array, "pages 2 K page_size H"],
    *,
    cos: Float[Array, "T half_H"],
    sin: Float[Array, "T half_H"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None,
    eps: float = 0.0,
    config: Config | None = None,
    launches_early: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages 2 K page_size H"]]:
    """Queries, normed and rotated, and the cache with each token's K and V in its place.

    A token whose page id is `pages` or more writes nothing; ids are never negative, and the places
    written must differ. The cache is the same buffer if it is donated. `launches_early`: see
    `pdl.py`.
    """
    T, K, heads, H = qkv.shape
    shape = Shape(T, K, heads - 2, H)
    if reason := unsupported(head_size=H, group_size=shape.G):
        raise ValueError(f"rotate_and_write: {reason}")
    config = config or default_config(shape)
    arrays = dict(qkv=qkv, cos=cos, sin=sin, page_ids=page_ids, offsets=offsets)
    norms = dict(q_norm=q_norm, k_norm=k_norm)
    arrays |= {name: scale for name, scale in norms.items() if scale is not None}
    results = (
        jax.ShapeDtypeStruct((T, K, shape.G, H), qkv.dtype),
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    )
    static = tuple(arrays), shape[1:], len(cache), config, eps, launches_early
    how: Any = dict(length=MANY_TOKENS, interpret=interpret)
    kernel = lowered_once(_call, *static, results=results, **how)
    q, cache = kernel(*arrays.values(), cache)
    return q.reshape(T, -1, H), cache


def _call(
    names: tuple[str, ...],
    heads: tuple[int, int, int],
    num_pages: int,
    config: Config,
    eps: float,
    launches_early: bool,
    results: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The call (arrays of these names, cache) -> q [T K G H] and the cache."""
    shape = Shape(results[0].shape[0], *heads)
    specs = _block_specs(shape, results[1].shape, config.tile_K)
    kernel = partial(
        _kernel,
        names=(*names, "old_cache", "q", "cache"),
        shape=shape,
        num_pages=num_pages,
        eps=eps,
        early=launches_early,
    )
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(shape.T, pl.cdiv(shape.K, config.tile_K)),
        in_specs=[specs[name] for name in (*names, "cache")],
        out_specs=(specs["q"], specs["cache"]),
        input_output_aliases={len(names): 1},
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="rotate_and_write",
        interpret=interpret,
    )


def _block_specs(shape: Shape, cache: tuple[int, ...], tile_K: int) -> dict[str, pl.BlockSpec]:
    """Blocks are as large as what is accessed, powers of two: every access is masked."""
    T, K, G, H = shape
    half, tile_G = pl.next_power_of_2(H // 2), pl.next_power_of_2(G)
    width, padded_K = H // 2 + half, pl.cdiv(K, tile_K) * tile_K
    pages, _, _, page_size, _ = cache
    heads = (None, tile_K, max(G + 2, tile_G), width)
    angles = pl.BlockSpec((None, half), lambda t, tile: (t, 0))
    norm = pl.BlockSpec((width,), lambda t, tile: (0,))
    integers = pl.BlockSpec((T,), lambda t, tile: (0,))
    return dict(
        qkv=pl.BlockSpec(heads, lambda t, tile: (t, tile, 0, 0)),
        cos=angles,
        sin=angles,
        page_ids=integers,
        offsets=integers,
        q_norm=norm,
        k_norm=norm,
        q=pl.BlockSpec((None, tile_K, tile_G, width), lambda t, tile: (t, tile, 0, 0)),
        cache=pl.BlockSpec((pages, 2, padded_K, page_size, width), lambda t, tile: (0,) * 5),
    )


class Halves(NamedTuple):
    """Of heads: what is turned with each other. [tile_K n half], half rounded up."""

    first: Array
    second: Array


def _kernel(
    *refs: Any, names: tuple[str, ...], shape: Shape, num_pages: int, eps: float, early: bool
) -> None:
    ref = dict(zip(names, refs, strict=True))
    (_, K, G, H), t = shape, pl.program_id(0)
    tile_K, tile_G, half = ref["qkv"].shape[0], pl.next_power_of_2(G), pl.next_power_of_2(H // 2)
    first_k = pl.program_id(1) * tile_K
    heads = jnp.arange(tile_K, dtype=jnp.int32)
    is_k = first_k + (launch_dependents(heads) if early else heads) < K
    is_h = jnp.arange(half) < H // 2
    angles = [_load(ref[name], (pl.ds(0, half),), is_h) for name in ("cos", "sin")]

    is_q = (is_k[:, None] & (jnp.arange(tile_G) < G)[None])[:, :, None] & is_h[None, None]
    q = _turned(ref, pl.Slice(0, tile_G), is_q, "q_norm", angles, H, eps)
    _store(ref["q"], (slice(None), pl.ds(0, tile_G)), q, is_q, H)

    is_kv = is_k[:, None, None] & is_h[None, None]
    k = _turned(ref, pl.Slice(G, 1), is_kv, "k_norm", angles, H, eps)
    v = _halves(ref["qkv"], pl.Slice(G + 1, 1), is_kv, H)
    page, offset = ref["page_ids"][t], ref["offsets"][t]
    is_kept = page < num_pages
    page = jnp.where(is_kept, page, 0)
    is_kv = is_kv.reshape(1, tile_K, half) & is_kept
    for which, kv in enumerate((k, v)):
        kv = Halves(*(part.reshape(1, tile_K, half) for part in kv))
        place = (page, pl.ds(which, 1), pl.ds(first_k, tile_K), offset)
        _store(ref["cache"], place, kv, is_kv, H)


def _turned(
    ref: dict[str, Any],
    heads: pl.Slice,
    mask: Array,
    norm: str,
    angles: list[Array],
    H: int,
    eps: float,
) -> Halves:
    """Heads of the token, normed if there is such a norm, and rotated."""
    x = _halves(ref["qkv"], heads, mask, H)
    if norm in ref:
        squares = (x.first * x.first + x.second * x.second).sum(axis=2)
        factor = lax.rsqrt(squares / H + eps)[:, :, None]
        half = x.first.shape[2]
        is_h = jnp.arange(half) < H // 2
        scales = [_load(ref[norm], (pl.ds(start, half),), is_h) for start in (0, H // 2)]
        x = Halves(*(part * factor * s[None, None] for part, s in zip(x, scales, strict=True)))
    cos, sin = (angle[None, None] for angle in angles)
    return Halves(x.first * cos - x.second * sin, x.second * cos + x.first * sin)


def _halves(ref: Any, heads: pl.Slice, mask: Array, H: int) -> Halves:
    half = mask.shape[2]
    places = [(slice(None), heads, pl.ds(start, half)) for start in (0, H // 2)]
    return Halves(*(_load(ref, place, mask) for place in places))


def _load(ref: Any, place: tuple[Any, ...], mask: Array) -> Array:
    return pltriton.load(ref.at[place], mask=mask, other=0).astype(jnp.float32)


def _store(ref: Any, place: tuple[Any, ...], x: Halves, mask: Array, H: int) -> None:
    for start, part in zip((0, H // 2), x, strict=True):
        part_place = (*place, pl.ds(start, part.shape[2]))
        pltriton.store(ref.at[part_place], part.astype(ref.dtype), mask=mask)


def default_config(shape: Shape) -> Config:
    """One kv head a program for few tokens; then all of them, for as few programs as can be."""
    tile_K = 1 if shape.T <= FEW_TOKENS else pl.next_power_of_2(shape.K)
    values = tile_K * pl.next_power_of_2(shape.G) * pl.next_power_of_2(shape.H)
    return Config(tile_K=tile_K, num_warps=max(1, min(4, values // 256)))


def unsupported(*, head_size: int, group_size: int) -> str | None:
    """Why the kernel cannot be used; None where it can."""
    if head_size % 2:
        return f"head size: expected an even one, got {head_size}"
    if group_size < 1:
        return f"expected query heads, got {group_size} of each kv head"
    return None


SHAPES = {  # without T
    "qwen3-0.6b": dict(K=8, G=2, H=128),
    "qwen2.5-0.5b": dict(K=2, G=7, H=64),
    "llama-3.2-1b": dict(K=8, G=4, H=64),
    "llama-3.1-8b": dict(K=8, G=4, H=128),
}
