"""The sizes an engine starts with, from its arguments, its model and its device's memory. Numbers
only."""

import warnings
from dataclasses import dataclass

from jaxengine.compiling import Bucket, buckets, rungs
from jaxengine.memory import GIB
from jaxengine.server_args import ServerArgs

# Least device memory in GiB -> prompt tokens of a step, running requests.
GPU_DEFAULTS = ((60, 8192, 256), (35, 4096, 64), (20, 2048, 32), (0, 2048, 16))
CPU_DEFAULTS = (512, 16)

# Sizes of compiled steps: close together where padding costs most; on a CPU, where compiling does
# and padding does not, few and far between.
GPU_DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
GPU_EXTEND = (64, 256, 1024, 2048, 4096, 8192, 16384)
CPU_DECODE = (1, 4, 16, 64, 256)
CPU_EXTEND = (32, 512, 8192)
FEW_ROWS = 8  # an extend step of a few prompts need not pay for the logits of a full batch


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the compiled steps and the scheduler are made for."""

    context_length: int
    max_running_requests: int
    chunk_size: int  # tokens of a step at most
    can_chunk: bool
    buckets: tuple[Bucket, ...]


def choose_sizes(args: ServerArgs, *, max_position: int, device_bytes: int, is_cpu: bool) -> Sizes:
    """The sizes for a model whose positions end at `max_position`."""
    context_length = args.context_length or max_position
    if context_length > max_position:
        warnings.warn(
            f"context_length: {context_length} is beyond the {max_position} positions that the "
            "model was made for; what it says there may make no sense",
            stacklevel=2,
        )
    chunk_default, running_default = _defaults(device_bytes, is_cpu)
    max_running = args.max_running_requests or running_default
    can_chunk = args.chunked_prefill_size != -1
    if can_chunk:
        chunk_size = min(
            args.chunked_prefill_size or chunk_default,
            args.max_prefill_tokens,
            max_running * context_length,
        )
    else:
        chunk_size = max(args.max_prefill_tokens, context_length)
    chunk_size = max(chunk_size, max_running)  # a step has room for every running request's token
    max_decode = min(args.cuda_graph_max_bs or max_running, max_running)
    return Sizes(
        context_length=context_length,
        max_running_requests=max_running,
        chunk_size=chunk_size,
        can_chunk=can_chunk,
        buckets=_buckets(args.cuda_graph_bs, max_decode, chunk_size, max_running, is_cpu),
    )


def _buckets(
    decode: tuple[int, ...] | None, max_decode: int, chunk_size: int, max_running: int, is_cpu: bool
) -> tuple[Bucket, ...]:
    extend = rungs(CPU_EXTEND if is_cpu else GPU_EXTEND, chunk_size)
    rows = [max_running] if is_cpu else [min(FEW_ROWS, max_running), max_running]
    default = rungs(CPU_DECODE if is_cpu else GPU_DECODE, max_decode)
    chosen = [size for size in decode or default if size <= max_running]
    return buckets(chosen, extend, rows)


def _defaults(device_bytes: int, is_cpu: bool) -> tuple[int, int]:
    if is_cpu:
        return CPU_DEFAULTS
    return next(sizes for least, *sizes in GPU_DEFAULTS if device_bytes >= least * GIB)  # type: ignore[return-value]
