"""From a model's shapes to its weights, its executables and the size of its KV pool. The weights
are read while the programs are traced and compiled, which depend on no value of them.
"""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jaxengine.compiling import compile_all, waiting
from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.installs import INSTALL_SIZES
from jaxengine.loading import FoundModel, abstract_model, choose_dtype, load_parameters
from jaxengine.memory import (
    GIB,
    Demand,
    bytes_in_use,
    num_bytes,
    num_pages_that_fit,
    step_bytes,
)
from jaxengine.models.bidirectional_attention import BLOCK
from jaxengine.models.config import ModelConfig
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.pallas_kernels.dispatch import XLA, Kernels, Problem, choose
from jaxengine.sampling.probabilities import block_size
from jaxengine.sampling_values import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxengine.server_args import ServerArgs
from jaxengine.sizing import Sizes
from jaxengine.step_programs import StepPrograms

EOS_ROOM = 8  # ends of a sequence that a model may have without changing a shape
ENOUGH_CONTEXTS = 2  # full-length requests per slot: a larger pool would only cache more prefixes

logger = logging.getLogger("jaxengine")

Result = TypeVar("Result")


def num_stop_ids(eos_token_ids: Collection[int]) -> int:
    """Room for those of a request and of the model. As a rule it is the same with the tokenizer's
    and without: an engine without one finds the programs of one that has it."""
    return MAX_STOP_TOKEN_IDS + max(len(eos_token_ids), EOS_ROOM)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a `Runner` runs, and what it took."""

    programs: StepPrograms
    executables: dict[Any, Any]
    params: Any
    num_pages: int
    demand: Demand
    dtype: str  # of weights and activations
    kernels: Kernels
    seconds: dict[str, float]  # of reading the weights and, at the same time, of compiling


def build(
    args: ServerArgs,
    found: FoundModel,
    sizes: Sizes,
    device: Any,
    functions: Functions = NO_FUNCTIONS,
) -> Built:
    """All of it; long, as it lists the parts.

    Raises:
        ValueError: weights that do not fit the model, kernels that do not fit the device, or no
            room for a pool.
    """
    is_cpu = device.platform == "cpu"
    dtype = choose_dtype(args, found.config, is_cpu)
    kernels = _kernels(args, found.config, sizes, dtype, device)
    abstract = abstract_model(found.config, dtype, found.embedder)
    graphdef, params = nnx.split(abstract)
    programs = StepPrograms(
        graphdef,
        params,
        num_layers=found.config.num_cached_layers,
        vocab_size=found.config.vocab_size,
        page_shape=(found.config.num_kv_heads, args.page_size, found.config.head_size),
        # On CPUs XLA may widen the whole 16-bit pool for every write into it.
        cache_dtype="float32" if is_cpu else dtype,
        num_slots=sizes.max_running_requests,
        context_length=sizes.context_length,
        num_stop_ids=num_stop_ids(found.eos_token_ids),
        num_bias=MAX_LOGIT_BIAS,
        device=device,
        kernels=kernels,
        has_raw_logprobs=args.logprobs_mode == "raw_logprobs",
        embeds=found.embeddings is not None,
        functions=functions,
    )
    demand = Demand(
        others=bytes_in_use(device),
        weights=num_bytes(programs.params),
        state=num_bytes(programs.state_shapes),
        steps=_foreseen_step_bytes(found.config, sizes, dtype),
    )
    reader = ThreadPoolExecutor(1, thread_name_prefix="jaxengine-weights")
    reading = reader.submit(_timed, lambda: load_parameters(args, found, abstract, device))
    reader.shutdown(wait=False)  # takes no more, and is not waited for if something fails
    (num_pages, executables), compile_seconds = _timed(
        lambda: _compile(args, programs, sizes, demand, reading)
    )
    params, weights_seconds = reading.result()
    return Built(
        programs=programs,
        executables=executables,
        params=params,
        num_pages=num_pages,
        demand=demand._replace(steps=max(map(step_bytes, executables.values()))),
        dtype=dtype,
        kernels=kernels,
        seconds={"weights": weights_seconds, "compile": compile_seconds},
    )


def _compile(
    args: ServerArgs, programs: StepPrograms, sizes: Sizes, demand: Demand, reading: Future
) -> tuple[int, dict[Any, Any]]:
    """The pool's size and all executables for it. What the largest step takes is known for sure
    only then; if it is more than was thought, everything is built again for a smaller pool."""
    num_pages = _num_pages(args, programs, sizes, demand)
    after = waiting(sizes.buckets)
    # Those that others wait for come first, then the slowest, and those that wait.
    rank = lambda bucket: (bucket in after, bucket not in after.values())
    buckets = sorted(reversed(sizes.buckets), key=rank)
    tasks: dict[Any, Any] = {
        bucket: lambda bucket=bucket: programs.trace_step(bucket, num_pages) for bucket in buckets
    }
    tasks |= {size: lambda size=size: programs.trace_install(size) for size in INSTALL_SIZES}
    executables = compile_all(
        tasks,
        shows_progress=args.show_progress,
        beside=reading,
        after=after,
    )
    steps = max(map(step_bytes, executables.values()))
    if num_pages > _num_pages(args, programs, sizes, demand._replace(steps=steps)):
        logger.info("a step takes %.2f GiB, more than foreseen; building again", steps / GIB)
        return _compile(args, programs, sizes, demand._replace(steps=steps), reading)
    return num_pages, executables


def _num_pages(args: ServerArgs, programs: StepPrograms, sizes: Sizes, demand: Demand) -> int:
    """The size asked for; else what fits, as far as it can be of use."""
    if args.max_total_tokens is not None:
        return args.max_total_tokens // args.page_size
    contexts = sizes.max_running_requests * ENOUGH_CONTEXTS
    fits = num_pages_that_fit(
        programs.device,
        demand,
        programs.page_bytes,
        mem_fraction_static=args.mem_fraction_static,
    )
    return min(contexts * -(-sizes.context_length // args.page_size), fits)


def _foreseen_step_bytes(config: ModelConfig | EncoderConfig, sizes: Sizes, dtype: str) -> int:
    """What the largest step will take: for every token three streams beside a layer's widest
    arrays, or for every row its logits twice; and a fourth of that for small things."""
    mlp = 3 * config.intermediate_size
    attention = 2 * (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    if isinstance(config, EncoderConfig):
        attention += 3 * config.num_heads * BLOCK  # scores and weights
    elements = sizes.chunk_size * (3 * config.hidden_size + max(mlp, attention))
    if config.head != "tokens":
        return elements * jnp.dtype(dtype).itemsize * 5 // 4
    logits = sizes.max_running_requests * config.vocab_size * 2 * 4
    # A step that tells of prompts' log-probabilities may be compiled at any time.
    block = 2 * 4 * block_size(config.vocab_size) * config.vocab_size
    return max(elements * jnp.dtype(dtype).itemsize, logits, block) * 5 // 4


def _kernels(
    args: ServerArgs,
    config: ModelConfig | EncoderConfig,
    sizes: Sizes,
    dtype: str,
    device: Any,
) -> Kernels:
    if isinstance(config, EncoderConfig):
        if args.attention_backend not in (None, "xla"):
            raise ValueError(
                f"attention_backend: expected xla, as encoders have no kernels of their own, got "
                f"{args.attention_backend}; leave it out"
            )
        return XLA
    capability = None
    if device.platform == "gpu" and "NVIDIA" in device.device_kind:
        major, minor = device.compute_capability.split(".")
        capability = int(major), int(minor)
    problem = Problem(
        capability=capability,
        dtype=dtype,
        head_size=config.head_size,
        group_size=config.group_size,
        page_size=args.page_size,
    )
    mixes_decode = args.enable_mixed_chunk or sizes.max_decode_rows < sizes.max_running_requests
    return choose(args.attention_backend, problem, mixes_decode=mixes_decode)


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started
