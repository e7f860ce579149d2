"""From arguments to a running loop: find the model, load it, size the memory, compile, start the
thread.

It is the one place where all the parts are put together; what each of them does is told elsewhere.
"""

import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from jaxengine import models
from jaxengine.admission import Limits
from jaxengine.building import build
from jaxengine.compiling import CompileCounter
from jaxengine.config import configure_jax
from jaxengine.function_checks import validate
from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.grammar import GrammarCompiler
from jaxengine.loading import FoundModel, find_model
from jaxengine.loop import Loop
from jaxengine.memory import Demand, device_bytes
from jaxengine.models.config import ModelConfig
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.occupation import Occupation
from jaxengine.pallas_kernels.dispatch import Kernels
from jaxengine.profiling import Profiler
from jaxengine.results import OutputOptions
from jaxengine.runner import Runner
from jaxengine.scheduler import Scheduler
from jaxengine.server_args import ServerArgs
from jaxengine.sizing import Sizes, choose_sizes
from jaxengine.variants import Variants
from jaxengine.watchdog import Watchdog
from jaxengine.weight_updates import named_parts

logger = logging.getLogger("jaxengine")


@dataclass(kw_only=True)
class Started:
    """The parts of a running engine."""

    args: ServerArgs
    loop: Loop
    tokenizer: Any
    limits: Limits
    grammars: GrammarCompiler
    sizes: Sizes
    occupation: Occupation
    random_seed: int
    found: FoundModel
    device: Any
    demand: Demand
    dtype: str
    kernels: Kernels
    num_pages: int
    page_bytes: int
    compile_counter: CompileCounter
    profiler: Profiler
    variants: Variants
    seconds: dict[str, float]  # phase of the start -> duration; some run side by side

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

    def output_options(self, is_stream: bool) -> OutputOptions:
        args = self.args
        return OutputOptions(
            ids_are_deltas=is_stream and (args.stream_output or args.incremental_streaming_output),
            text_is_delta=is_stream and args.incremental_streaming_output,
        )


def start(args: ServerArgs, functions: Functions = NO_FUNCTIONS) -> Started:
    """A loop that is running and has nothing left to compile. Long, as it lists all the parts.

    Raises:
        ValueError: a model, tokenizer, device or size that cannot be had, with the reason.
    """
    logger.setLevel(args.log_level.upper())
    configure_jax()
    started, seconds = time.perf_counter(), dict[str, float]()
    device = _device(args.device)
    with _phase("tokenizer", seconds):
        found = find_model(args)
    sizes = choose_sizes(
        args,
        max_position=_max_position(args, found),
        device_bytes=device_bytes(device),
        is_cpu=device.platform == "cpu",
        embeddings=found.embeddings,
    )
    config = found.config
    if functions and found.embeddings is not None:
        raise ValueError(
            "logits_processors, sampler, interventions: an engine that makes embeddings takes "
            "none; leave them out"
        )
    validate(functions, config.vocab_size, config.hidden_size, config.num_layers)
    built = build(args, found, sizes, device, functions)
    programs, num_pages = built.programs, built.num_pages
    seconds |= built.seconds
    with _phase("warm up", seconds):
        runner = Runner(
            programs, built.executables, built.params, num_pages, shows_progress=args.show_progress
        )
        if device.platform != "cpu":
            gc.collect()  # all that was imported: 0.4 s, for which the device waits in a call else
    random_seed = random.getrandbits(30) if args.random_seed is None else args.random_seed
    counter, profiler = CompileCounter(), Profiler()
    scheduler = _scheduler(args, sizes, num_pages, found, random_seed)
    grammars = _grammars(args, found)

    def end() -> None:
        counter.close()
        grammars.close()
        profiler.close()

    loop = Loop(
        scheduler,
        runner,
        overlaps=not args.disable_overlap_schedule,
        max_queued_requests=args.max_queued_requests,
        weight_version=args.weight_version,
        begin_masks=grammars.begin_masks,
        on_start=counter.start,
        on_end=end,
    )
    loop.start()
    Watchdog(loop, args.watchdog_timeout).start()
    seconds["total"] = time.perf_counter() - started
    logger.info("ready: %s", ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()))
    limits = Limits(
        vocab_size=found.config.vocab_size,
        num_layers=found.config.num_layers,
        context_length=sizes.context_length,
        pool_tokens=num_pages * args.page_size,
        eos_token_ids=found.eos_token_ids,
        truncates=args.allow_auto_truncate,
        generates=found.embeddings is None,
        functions=functions,
    )
    if found.embeddings is not None and found.tokenizer is not None and limits.truncates:
        # So a text keeps the special token at its end.
        found.tokenizer.backend_tokenizer.enable_truncation(limits.max_prompt_tokens)
    return Started(
        args=args,
        loop=loop,
        tokenizer=found.tokenizer,
        grammars=grammars,
        limits=limits,
        sizes=sizes,
        occupation=Occupation(
            loop,
            runner,
            named_parts(built.params, found.pieces, models.base_prefix(found.config)),
            programs.params,
            keeps_backup=args.enable_weights_cpu_backup,
        ),
        random_seed=random_seed,
        found=found,
        device=device,
        demand=built.demand,
        dtype=built.dtype,
        kernels=built.kernels,
        num_pages=num_pages,
        page_bytes=programs.page_bytes,
        compile_counter=counter,
        profiler=profiler,
        variants=runner.variants,
        seconds=seconds,
    )


def _grammars(args: ServerArgs, found: FoundModel) -> GrammarCompiler:
    return GrammarCompiler(
        found.tokenizer,
        found.config.vocab_size,
        found.eos_token_ids,
        whitespace_pattern=args.constrained_json_whitespace_pattern,
        any_whitespace=not args.constrained_json_disable_any_whitespace,
    )


def _max_position(args: ServerArgs, found: FoundModel) -> int:
    """Tokens of the longest sequence that the model was made for."""
    max_position = found.config.max_position
    if isinstance(found.config, EncoderConfig) and (args.context_length or 0) > max_position:
        raise ValueError(
            f"context_length: expected at most the {max_position} positions that the encoder has, "
            f"got {args.context_length}; use a longer model"
        )
    if found.embeddings is not None and found.embeddings.max_length is not None:
        return min(max_position, found.embeddings.max_length)
    return max_position


def _scheduler(
    args: ServerArgs, sizes: Sizes, num_pages: int, found: FoundModel, random_seed: int
) -> Scheduler:
    # With `dynamic` rope a key depends on the length of its own prompt: no other prompt may read
    # it. And what is read whole finds nothing that was read before.
    can_share = isinstance(found.config, ModelConfig) and found.config.rope.type != "dynamic"
    if found.embeddings is not None and found.embeddings.reads_whole:
        can_share = False
    return Scheduler(
        num_pages=num_pages,
        page_size=args.page_size,
        max_running_requests=sizes.max_running_requests,
        chunk_size=sizes.chunk_size,
        can_chunk=sizes.can_chunk,
        mixes_decode=args.enable_mixed_chunk,
        policy=args.schedule_policy,
        uses_priority=args.enable_priority_scheduling or args.schedule_policy == "priority",
        low_priority_first=args.schedule_low_priority_values_first,
        shares_prefixes=can_share and not args.disable_radix_cache,
        conservativeness=args.schedule_conservativeness,
        decode_steps=sizes.decode_steps,
        max_decode_rows=sizes.max_decode_rows,
        random_seed=random_seed,
    )


def _device(kind: str | None) -> Any:
    if kind is None:
        return jax.devices()[0]
    try:
        return jax.devices("cpu" if kind == "cpu" else "gpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"device: there is no {kind} device that JAX can use ({error}); install the extra "
            "cuda13 or cuda12, or leave device out"
        ) from error


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
