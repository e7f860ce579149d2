"""The sizes an engine starts with, from its arguments, its model and its device's memory. Numbers
only."""

import warnings
from dataclasses import dataclass

from jaxengine.compiling import Bucket, buckets, decode_sizes, parts
from jaxengine.memory import GIB
from jaxengine.server_args import ServerArgs

# Least device memory in GiB -> prompt tokens of a step, running requests.
GPU_DEFAULTS = ((60, 8192, 256), (35, 4096, 64), (20, 2048, 32), (0, 2048, 16))
CPU_DEFAULTS = (512, 16)
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
    """On a CPU few and far between: compiling costs more there than padding."""
    if is_cpu:
        default = parts(max_decode, factor=4, least=1)
        extend, rows = parts(chunk_size, factor=16, least=16), [max_running]
    else:
        default = decode_sizes(max_decode)
        extend, rows = (
            parts(chunk_size, factor=2, least=16),
            [min(FEW_ROWS, max_running), max_running],
        )
    chosen = [size for size in decode or default if size <= max_running]
    return buckets(chosen, extend, rows)


def _defaults(device_bytes: int, is_cpu: bool) -> tuple[int, int]:
    if is_cpu:
        return CPU_DEFAULTS
    return next(sizes for least, *sizes in GPU_DEFAULTS if device_bytes >= least * GIB)  # type: ignore[return-value]
