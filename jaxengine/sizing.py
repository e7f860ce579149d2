"""The sizes an engine starts with, from its arguments, its model and its device's memory. Numbers
only."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from jaxengine.compiling import Bucket, buckets, rungs
from jaxengine.memory import GIB
from jaxengine.pooling import Embeddings
from jaxengine.server_args import ServerArgs

# Least device memory in GiB -> prompt tokens of a step, running requests.
GPU_DEFAULTS = ((60, 8192, 512), (35, 4096, 64), (20, 2048, 32), (0, 2048, 16))
CPU_DEFAULTS = (512, 16)

# Sizes of compiled steps: close together where padding costs most; on a CPU, where compiling does
# and padding does not, few and far between.
GPU_DECODE = (1, 2, 8, 16, 32, 64, 128, 192, 256, 384, 512)
GPU_EXTEND = (256, 1024, 2048, 4096, 8192, 16384)
GPU_TILE = 64
CPU_DECODE = (1, 4, 16, 64, 256)
CPU_EXTEND = (32, 512, 8192)
GPU_DECODE_STEPS = 8  # so the host's work for one launch is hidden behind several steps
EMBEDDING_TOKENS = 8  # of a step to one slot: short texts, and two steps of them at a time
GPU_SINGLE_STEP = (1, 16, 64, 256)  # for streams, and the last tokens of others: fewer sizes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the compiled steps and the scheduler are made for."""

    context_length: int
    max_running_requests: int
    chunk_size: int  # tokens of a step at most
    can_chunk: bool
    decode_steps: int  # of one launch where nobody waits for single tokens
    max_decode_rows: int  # of a decoding launch; more rows run as ragged ones
    buckets: tuple[Bucket, ...]


def choose_sizes(
    args: ServerArgs,
    *,
    max_position: int,
    device_bytes: int,
    is_cpu: bool,
    embeddings: Embeddings | None = None,
) -> Sizes:
    """The sizes for a model whose positions end at `max_position`. One that makes embeddings never
    decodes, and may have to read every sequence at once. Long, as each size follows from others."""
    context_length = args.context_length or max_position
    if context_length > max_position:
        warnings.warn(
            f"context_length: {context_length} is beyond the {max_position} positions that the "
            "model was made for; what it says there may make no sense",
            stacklevel=2,
        )
    chunk_default, running_default = _defaults(device_bytes, is_cpu)
    if embeddings is not None:
        running_default = chunk_default // EMBEDDING_TOKENS
    max_running = args.max_running_requests or running_default
    reads_whole = embeddings is not None and embeddings.reads_whole
    can_chunk = args.chunked_prefill_size != -1 and not reads_whole
    asked = args.chunked_prefill_size or chunk_default
    if can_chunk:
        chunk_size = min(asked, args.max_prefill_tokens, max_running * context_length)
    elif args.chunked_prefill_size == -1:
        chunk_size = max(args.max_prefill_tokens, context_length)
    else:
        chunk_size = max(asked, context_length)
    chunk_size = max(chunk_size, max_running)  # a step has room for every running request's token
    max_decode = min(args.cuda_graph_max_bs or max_running, max_running)
    decode_steps, decode = 1, {}
    if embeddings is None:
        decode_steps = args.num_continuous_decode_steps or _decode_steps(args.page_size, is_cpu)
        decode = _decode_rows(args.cuda_graph_bs, decode_steps, max_decode, max_running, is_cpu)
    extend = rungs(CPU_EXTEND if is_cpu else GPU_EXTEND, chunk_size)
    if not is_cpu:  # kernels take tokens by the tile
        extend = [-(-size // GPU_TILE) * GPU_TILE for size in extend]
    return Sizes(
        context_length=context_length,
        max_running_requests=max_running,
        chunk_size=chunk_size,
        can_chunk=can_chunk,
        decode_steps=decode_steps,
        max_decode_rows=max(decode[1]) if decode else 0,
        buckets=buckets(decode, extend, max_running),
    )


def _decode_steps(page_size: int, is_cpu: bool) -> int:
    return 1 if is_cpu else min(GPU_DECODE_STEPS, page_size)


def _decode_rows(
    wanted: tuple[int, ...] | None,
    decode_steps: int,
    max_decode: int,
    max_running: int,
    is_cpu: bool,
) -> dict[int, Sequence[int]]:
    """Steps of a decoding launch -> the numbers of rows to compile it for."""
    if wanted is not None:
        sizes = [size for size in wanted if size <= max_running] or [max_running]
        return {1: sizes, decode_steps: sizes}
    if is_cpu:
        return {steps: rungs(CPU_DECODE, max_decode) for steps in (1, decode_steps)}
    single = GPU_DECODE if decode_steps == 1 else GPU_SINGLE_STEP
    return {decode_steps: rungs(GPU_DECODE, max_decode), 1: rungs(single, max_decode)}


def _defaults(device_bytes: int, is_cpu: bool) -> tuple[int, int]:
    if is_cpu:
        return CPU_DEFAULTS
    return next(sizes for least, *sizes in GPU_DEFAULTS if device_bytes >= least * GIB)  # type: ignore[return-value]
