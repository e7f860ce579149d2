"""The call of the kernel of `paged_decode`, for queries that are rotated already, or that it
rotates itself: sizes, plan, memory, and the two warpgroups of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.lowered_once import LONGEST, lowered_once
from jaxengine.pallas_kernels.mosaic import interpreter
from jaxengine.pallas_kernels.paged_decode_consumer import Consumer
from jaxengine.pallas_kernels.paged_decode_plan import Plan, make_plan
from jaxengine.pallas_kernels.paged_decode_producer import copy_all
from jaxengine.pallas_kernels.paged_decode_products import INTERPRETED, ON_GPU
from jaxengine.pallas_kernels.paged_decode_segments import Memory, Problem

OUT_PAD = 8  # elements between rows of results, so that what is stored at once differs in bank
CORES = 132  # of a full Hopper chip as it is sold


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    tile: int = 64  # tokens of one step, a multiple of 64
    stages: int = 3  # tiles of K and V in shared memory
    blocks: int = 2 * CORES  # of the grid: no more than fit on the chip
    min_run: int = 2  # tiles; fewer are not worth a block
    merge_cost: int = 5  # of a (row, kv head) that is cut, in tiles


def config_for(*, head_size: int, group_size: int) -> Config:
    """Tiles of 32 KiB, K and V, and two blocks a core; one, where two do not fit."""
    if head_size > 128:
        return Config(blocks=CORES, merge_cost=3)
    tile = 64 * 128 // head_size
    return Config(tile=tile) if group_size <= 8 else Config(tile=tile, stages=5, blocks=CORES)


def attend(
    q: Float[Array, "heads H"],
    cache: Float[Array, "pages 2 K page_size H"],
    own: dict[str, Array],
    *,
    num_heads: int,
    kv_lens: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config | None,
    plan: Plan | None,
    interpret: bool,
    eps: float = 0.0,
) -> tuple[Float[Array, "B N H"], Float[Array, "pages 2 K page_size H"] | None]:
    """The call of the kernel, which prepares queries if it is given what their `own` tokens need;
    its result, and the cache if it was written."""
    B, N, (_, _, K, page_size, H) = len(kv_lens), num_heads, cache.shape
    config = config_for(head_size=H, group_size=N // K) if config is None else config
    if plan is None:
        heads = dict(num_heads=N, num_kv_heads=K, head_size=H)
        plan = plan_for(kv_lens, **heads, window=window, config=config)
    problem = Problem(
        N=N,
        K=K,
        H=H,
        page_size=page_size,
        tile=config.tile,
        stages=config.stages,
        blocks=config.blocks,
        scale=float(scale),
        window=window,
        soft_cap=soft_cap,
        prepares=bool(own),
        eps=eps,
    )
    # Flat, since the copy engine knows 5 dimensions at most, those of tiles included.
    kv = cache.reshape(-1, H)
    arrays = plan._asdict() | dict(kv_lens=kv_lens, page_table=page_table, q=q, kv=kv) | own
    results = _results(problem, B, q.dtype)
    in_place = {}
    if own:
        in_place = {list(arrays).index("kv"): len(results)}
        results |= dict(new_kv=jax.ShapeDtypeStruct(kv.shape, kv.dtype))
    call = lowered_once(
        _kernel,
        problem,
        (*arrays, *results),
        results=tuple(results.values()),
        length=LONGEST,
        in_place=in_place,
        interpret=interpret,
    )
    out, _, _, *new_kv = call(*arrays.values())
    if not problem.writes_zeros:
        out = jnp.where((kv_lens > 0)[:, None], out, 0)
    return out.reshape(B, N, H), new_kv[0].reshape(cache.shape) if new_kv else None


def _results(problem: Problem, num_rows: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Attention, and what blocks that share a row tell each other."""
    blocks, H, C = problem.blocks, problem.H, problem.C
    return dict(
        out=jax.ShapeDtypeStruct((num_rows, problem.N * H), dtype),
        means=jax.ShapeDtypeStruct((blocks, H, C), jnp.float32),  # of V
        logs=jax.ShapeDtypeStruct((blocks, C), jnp.float32),  # of their weights
    )


def plan_for(
    kv_lens: Int[Array, " B"],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    window: int | None,
    config: Config | None = None,
) -> Plan:
    """Who does what for such lengths: the same for all layers of one window."""
    if config is None:
        config = config_for(head_size=head_size, group_size=num_heads // num_kv_heads)
    return make_plan(
        kv_lens,
        num_kv_heads=num_kv_heads,
        num_blocks=config.blocks,
        tile=config.tile,
        window=window,
        min_run=config.min_run,
        merge_cost=config.merge_cost,
    )


def _kernel(
    problem: Problem, names: tuple[str, ...], results: tuple[Any, ...], interpret: bool
) -> Callable[..., Any]:
    """The call of arrays, which with the results have these names: see `Memory`."""
    H, C, tile, stages = problem.H, problem.C, problem.tile, problem.stages
    dtype = results[0].dtype
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    barriers = partial(plgpu.Barrier, num_barriers=stages)
    scratch = dict(
        # As they come: a tiled copy begins at every 8th row only.
        q_rows=plgpu.SMEM((max(C, problem.width), H), dtype),
        q_tile=plgpu.SMEM((C, H), dtype, transforms=tiled),
        k_tiles=plgpu.SMEM((stages, tile, H), dtype, transforms=tiled),
        v_tiles=plgpu.SMEM((stages, tile, H), dtype, transforms=tiled),
        weights=plgpu.SMEM((C, tile), dtype, transforms=tiled),
        out_rows=plgpu.SMEM((C, H + OUT_PAD), dtype),
        q_full=plgpu.Barrier(num_barriers=1),
        q_free=plgpu.Barrier(num_barriers=1),
        k_full=barriers(num_arrivals=problem.boxes),
        v_full=barriers(num_arrivals=problem.boxes),
        kv_free=barriers(),
    )
    options = dict(interpret=interpreter()) if interpret else {}
    return plgpu.kernel(
        partial(_run_block, problem, names, interpret),
        out_type=results,
        scratch_types=scratch,
        grid=(problem.blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )


def _run_block(
    problem: Problem, names: tuple[str, ...], interpret: bool, *arrays: Any, **scratch: Any
) -> None:
    memory = Memory(**dict(zip(names, arrays, strict=True)), **scratch)
    warpgroup = lax.axis_index("warpgroup")
    consumer = Consumer(problem, memory, INTERPRETED if interpret else ON_GPU)
    pl.when(warpgroup == 0)(consumer.attend_all)
    pl.when(warpgroup == 1)(lambda: copy_all(problem, memory))
