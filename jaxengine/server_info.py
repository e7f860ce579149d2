"""What an engine tells of itself: arguments as they were resolved, sizes, and counters of the run.
Plain data, by SGLang's names where it has one."""

from dataclasses import asdict
from typing import Any

from jaxengine.startup import Started
from jaxengine.version import __version__


def server_info(started: Started) -> dict[str, Any]:
    """What `Engine.get_server_info` returns."""
    args, sizes = started.args, started.sizes
    return {
        **asdict(args),
        **scheduler_info(started),
        "weight_version": started.loop.weight_version,
        "served_model_name": args.served_model_name or args.model_path,
        "tokenizer_path": args.tokenizer_path or args.model_path,
        "version": __version__,
        "device": str(started.device),
        "dtype": started.dtype,
        "random_seed": started.random_seed,
        "context_length": sizes.context_length,
        "max_running_requests": sizes.max_running_requests,
        "chunked_prefill_size": sizes.chunk_size if sizes.can_chunk else -1,
        "attention_backend": args.attention_backend or started.kernels.decode,
        "decode_attention_backend": started.kernels.decode,
        "prefill_attention_backend": started.kernels.extend,
        "num_continuous_decode_steps": sizes.decode_steps,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "startup_time": dict(started.seconds),
        "compiled_steps": [tuple(bucket) for bucket in sizes.buckets],
        "num_compilations_since_start": started.compile_counter.count,
        "num_steps": started.loop.num_steps,
        "internal_states": [_internal_state(started)],
    }


def scheduler_info(started: Started) -> dict[str, Any]:
    """What SGLang's scheduler tells when it is ready."""
    return {
        "status": "ready" if started.loop.is_alive else "stopped",
        "max_total_num_tokens": started.limits.pool_tokens,
        "max_req_input_len": started.limits.max_prompt_tokens,
    }


def model_info(started: Started) -> dict[str, Any]:
    """What `Engine.get_model_info` returns."""
    args = started.args
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.tokenizer_path or args.model_path,
        "served_model_name": args.served_model_name or args.model_path,
        "architectures": [started.found.config.architecture],
        "is_generation": started.found.embeddings is None,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "load_format": args.load_format,
        "dtype": started.dtype,
        "weight_version": started.loop.weight_version,
        "preferred_sampling_params": args.preferred_sampling_params,
    }


def _internal_state(started: Started) -> dict[str, Any]:
    scheduler = started.loop.scheduler
    return {
        "last_gen_throughput": started.loop.throughput,
        "num_running": len(scheduler.running),
        "num_waiting": scheduler.num_waiting,
        "is_paused": scheduler.is_halted,
        "effective_max_running_requests_per_dp": started.sizes.max_running_requests,
        "memory_usage": {  # GiB, but for the capacity
            "weight": started.demand.weights / 2**30,
            "kvcache": started.num_pages * started.page_bytes / 2**30,
            "graph": started.demand.steps / 2**30,
            "token_capacity": started.limits.pool_tokens,
        },
    }
