"""What Mosaic kernels share: their launch, and where versions of JAX differ."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCKS = 132  # multiprocessors of an H100 or H200
SHARED_MEMORY = 225 * 1024  # bytes of a block, barriers apart
REGISTERS, FEW_REGISTERS = 232, 40  # of a thread that computes, and of one that copies


def interpreter() -> Any:
    """What runs a kernel on a CPU: public since JAX 0.11."""
    if (public := getattr(plgpu, "InterpretGPUParams", None)) is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def warpgroup_kernel(
    body: Callable[..., None],
    *,
    results: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Any,
    num_blocks: int,
    num_warpgroups: int,
    interpret: bool,
) -> Callable[..., Any]:
    """The call of a kernel whose body, run by each warpgroup, knows the axes `block` and
    `warpgroup`, and whose layouts are found for it."""
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter() if interpret else False,
    )
