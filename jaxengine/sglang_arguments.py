"""The arguments of SGLang's `ServerArgs` (0.5.9) that are no fields of ours, and what becomes of
each: ignored with a warning, or refused. It does not know our own fields. Long, but one table.

An argument is ignored where leaving it out changes no result, and refused where the caller would
get something else than what was asked for.
"""

import ast
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple


class Ignored(NamedTuple):
    """No meaning here; `reason` says why. Anything but a default is answered with a warning."""

    reason: str
    defaults: tuple[Any, ...] = ()


class Refused(NamedTuple):
    """Not available here; `reason` says why and what to do instead. Only a default is accepted."""

    reason: str
    defaults: tuple[Any, ...] = ()


Verdict = Ignored | Refused

# A bare name is a flag; `name=x` is an argument with its default; `name=x|y` takes either.
GROUPS: tuple[tuple[Verdict, str], ...] = (
    (
        Refused(
            "one engine runs on one GPU so far; start one process per GPU and split the prompts"
        ),
        """tp_size=1 pp_size=1 dp_size=1 attn_cp_size=1 moe_dp_size=1 nnodes=1 node_rank=0
        dist_init_addr=None pp_max_micro_batch_size=None pp_async_batch_depth=0
        moe_dense_tp_size=None enable_dp_attention enable_dp_lm_head
        enable_attn_tp_input_scattered enable_nsa_prefill_context_parallel""",
    ),
    (
        Refused("the engine takes the first visible GPU; choose it with CUDA_VISIBLE_DEVICES"),
        "base_gpu_id=0 gpu_id_step=1",
    ),
    (
        Ignored("it tunes communication between GPUs, and one engine runs on one GPU"),
        """dist_timeout=None nccl_port=None load_balance_method=auto enable_nccl_nvls
        enable_symm_mem enable_torch_symm_mem enable_mscclpp disable_custom_all_reduce
        enable_p2p_check enable_flashinfer_allreduce_fusion
        nsa_prefill_cp_mode=round-robin-split""",
    ),
    (
        Refused("expert parallelism is not available; leave it out"),
        """ep_size=1 moe_a2a_backend=none elastic_ep_backend=None mooncake_ib_device=None
        ep_num_redundant_experts=0 ep_dispatch_algorithm=None init_expert_location=trivial
        enable_eplb expert_distribution_recorder_mode=None enable_expert_distribution_metrics""",
    ),
    (
        Ignored("it tunes kernels and expert placement that do not exist here"),
        """moe_runner_backend=auto flashinfer_mxfp4_moe_precision=default deepep_mode=auto
        deepep_config=None eplb_algorithm=auto eplb_rebalance_num_iterations=1000
        eplb_rebalance_layers_per_chunk=None eplb_min_rebalancing_utilization_threshold=1.0
        expert_distribution_recorder_buffer_size=None disable_shared_experts_fusion
        disable_flashinfer_cutlass_moe_fp4_allgather enable_two_batch_overlap
        enable_single_batch_overlap tbo_token_distribution_threshold=0.48""",
    ),
    (
        Refused("quantization is not available yet; use an unquantized checkpoint, and dtype"),
        """quantization=None quantization_param_path=None kv_cache_dtype=auto modelopt_quant=None
        modelopt_checkpoint_restore_path=None modelopt_checkpoint_save_path=None
        modelopt_export_path=None quantize_and_serve rl_quant_profile=None torchao_config=''""",
    ),
    (
        Refused("LoRA adapters are not available yet; merge the adapter into the checkpoint"),
        """enable_lora enable_lora_overlap_loading max_lora_rank=None lora_target_modules=None
        lora_paths=None max_loaded_loras=None""",
    ),
    (
        Ignored("there are no LoRA adapters to tune"),
        "max_loras_per_batch=8 lora_eviction_policy=lru lora_backend=csgmv max_lora_chunk_size=16",
    ),
    (
        Refused("speculative decoding is not available yet; leave it out, the text stays the same"),
        """speculative_algorithm=None speculative_draft_model_path=None
        speculative_draft_model_revision=None speculative_draft_load_format=None
        speculative_draft_model_quantization=None speculative_token_map=None
        speculative_accept_threshold_single=1.0 speculative_accept_threshold_acc=1.0
        enable_multi_layer_eagle decrypted_draft_config_file=None""",
    ),
    (
        Ignored("there is no speculative decoding to tune"),
        """speculative_num_steps=None speculative_eagle_topk=None speculative_num_draft_tokens=None
        speculative_attention_mode=prefill speculative_draft_attention_backend=None
        speculative_moe_runner_backend=None speculative_moe_a2a_backend=None
        speculative_ngram_min_match_window_size=1 speculative_ngram_max_match_window_size=12
        speculative_ngram_min_bfs_breadth=1 speculative_ngram_max_bfs_breadth=10
        speculative_ngram_match_type=BFS speculative_ngram_branch_length=18
        speculative_ngram_capacity=10000000 enable_draft_weights_cpu_backup""",
    ),
    (
        Refused("prefill and decode run in one engine here; leave disaggregation out"),
        """disaggregation_mode=null disaggregation_decode_tp=None disaggregation_decode_dp=None
        disaggregation_prefill_pp=1 disaggregation_ib_device=None
        disaggregation_decode_enable_offload_kvcache encoder_only language_only encoder_urls=[]
        enable_pdmux pdmux_config_path=None""",
    ),
    (
        Ignored("there is no disaggregation to tune"),
        """disaggregation_transfer_backend=mooncake disaggregation_bootstrap_port=8998
        disaggregation_decode_polling_interval=1 num_reserved_decode_tokens=512
        encoder_transfer_backend=zmq_to_scheduler sm_group_num=8""",
    ),
    (
        Refused("weights and KV cache stay on the GPU; use a smaller model or context_length"),
        """enable_hierarchical_cache hicache_storage_backend=None enable_lmcache cpu_offload_gb=0
        offload_group_size=-1 kt_weight_path=None kt_method=None kt_cpuinfer=None
        kt_threadpool_count=None kt_num_gpu_experts=None kt_max_deferred_experts_per_token=None""",
    ),
    (
        Ignored("there is no host or storage tier of the cache to tune"),
        """hicache_ratio=2.0 hicache_size=0 hicache_write_policy=write_through
        hicache_io_backend=kernel hicache_mem_layout=layer_first disable_hicache_numa_detect
        hicache_storage_prefetch_policy=best_effort hicache_storage_backend_extra_config=None
        hierarchical_sparse_attention_extra_config=None offload_num_in_group=1
        offload_prefetch_step=1 offload_mode=cpu numa_node=None""",
    ),
    (
        Refused("images, audio and video are not available yet; send text or token ids"),
        """enable_multimodal mm_process_config=None limit_mm_data_per_request=None
        enable_prefix_mm_cache mm_enable_dp_encoder""",
    ),
    (
        Ignored("there are no images, audio or video to process"),
        """mm_attention_backend=None mm_max_concurrent_calls=32 mm_per_request_timeout=10.0
        enable_broadcast_mm_inputs_process disable_fast_image_processor
        keep_mm_feature_on_device enable_precise_embedding_interpolation""",
    ),
    (
        Refused(
            "code that comes with a checkpoint is never run; use a model of a supported family"
        ),
        "trust_remote_code",
    ),
    (
        Refused("our own model definitions run, or none; leave it out"),
        "model_impl=auto|sglang",
    ),
    (
        Refused("weights come from safetensors files as they are; leave it out"),
        """model_checksum=None custom_weight_loader=None decrypted_config_file=None
        delete_ckpt_after_loading checkpoint_engine_wait_weights_before_ready
        remote_instance_weight_loader_seed_instance_ip=None
        remote_instance_weight_loader_seed_instance_service_port=None
        remote_instance_weight_loader_send_weights_group_ports=None
        remote_instance_weight_loader_start_seed_via_transfer_engine""",
    ),
    (
        Ignored("safetensors files are memory-mapped and placed tensor by tensor"),
        """model_loader_extra_config='{}'|{} weight_loader_disable_mmap
        remote_instance_weight_loader_backend=nccl""",
    ),
    (
        Refused("only text is generated so far; leave it out"),
        """multi_item_scoring_delimiter=None enable_return_routed_experts
        dllm_algorithm=None dllm_algorithm_config=None""",
    ),
    (
        Ignored("any request may ask for it, at no cost to the others"),
        "enable_return_hidden_states=False|True enable_custom_logit_processor=False|True",
    ),
    (
        Refused("there are no hooks into the model yet; leave it out"),
        """forward_hooks=None debug_tensor_dump_output_folder=None debug_tensor_dump_layers=None
        debug_tensor_dump_input_file=None debug_tensor_dump_inject""",
    ),
    (
        Refused("set JAX_DEBUG_NANS=1 instead, which names the operation"),
        "enable_nan_detection",
    ),
    (
        Ignored("memory can be released and resumed in any case"),
        "enable_memory_saver",
    ),
    (
        Refused(
            "bitwise equality across batch sizes is not available yet; sampling noise already "
            "depends on a request's seed alone"
        ),
        "enable_deterministic_inference rl_on_policy_target=None",
    ),
    (
        Refused("attention is exact; leave it out"),
        "enable_double_sparsity ds_channel_config_path=None",
    ),
    (
        Refused("reasoning is not separated from the answer; split the text after generation"),
        "reasoning_parser=None",
    ),
    (
        Refused("not available; set enable_priority_scheduling, or send no priorities"),
        "abort_on_priority_when_disabled",
    ),
    (
        Ignored("the choice of kernels is made by attention_backend and by XLA"),
        """decode_attention_backend=None prefill_attention_backend=None sampling_backend=None
        fp8_gemm_runner_backend=auto fp4_gemm_runner_backend=flashinfer_cutlass
        nsa_prefill_backend=None nsa_decode_backend=None disable_flashinfer_autotune
        triton_attention_reduce_in_fp32 triton_attention_num_kv_splits=8
        triton_attention_split_tile_size=None flashinfer_mla_disable_ragged
        disable_chunked_prefix_cache enable_fused_qk_norm_rope ds_heavy_channel_num=32
        ds_heavy_token_num=256 ds_heavy_channel_type=qk ds_sparse_decode_threshold=4096""",
    ),
    (
        Ignored("logits are computed in float32 in any case"),
        "enable_fp32_lm_head",
    ),
    (
        Ignored("no model with Mamba layers is supported, so there is nothing to tune"),
        """mamba_backend=triton max_mamba_cache_size=None mamba_ssm_dtype=None
        mamba_full_memory_ratio=0.9 mamba_scheduler_strategy=auto mamba_track_interval=256""",
    ),
    (
        Ignored("every step is compiled ahead by XLA, which makes CUDA graphs of it by itself"),
        """disable_cuda_graph disable_cuda_graph_padding enable_profile_cuda_graph
        enable_cudagraph_gc enable_torch_compile enable_torch_compile_debug_mode
        torch_compile_max_bs=32 enable_piecewise_cuda_graph piecewise_cuda_graph_max_tokens=None
        piecewise_cuda_graph_tokens=None piecewise_cuda_graph_compiler=eager skip_server_warmup
        warmups=None""",
    ),
    (
        Ignored("the scheduler has no such setting; it bounds a step by tokens, rows and pages"),
        """enable_dynamic_chunking prefill_max_requests=None
        priority_scheduling_preemption_threshold=10 scheduler_recv_interval=1 sleep_on_idle
        enable_prefill_delayer prefill_delayer_max_delay_passes=30
        prefill_delayer_token_usage_low_watermark=None
        prefill_delayer_forward_passes_buckets=None prefill_delayer_wait_seconds_buckets=None""",
    ),
    (
        Ignored(
            "there is one page pool for all layers, and it evicts the least recently used prefix"
        ),
        "swa_full_tokens_ratio=0.8 disable_hybrid_swa_memory radix_eviction_policy=lru",
    ),
    (
        Ignored("tokenization happens in the caller's thread and is not the bottleneck"),
        """tokenizer_worker_num=1 enable_tokenizer_batch_encode disable_tokenizer_batch_decode
        enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size=32
        dynamic_batch_tokenizer_batch_timeout=0.002""",
    ),
    (
        Ignored("structured output is llguidance's, which keeps nothing on disk"),
        "disable_outlines_disk_cache",
    ),
    (
        Ignored("there is no HTTP server; generate() applies no chat template"),
        """host=127.0.0.1 port=30000 fastapi_root_path='' grpc_mode api_key=None admin_api_key=None
        log_level_http=None uvicorn_access_log_exclude_prefixes=[] chat_template=None
        hf_chat_template_name=None completion_template=None file_storage_path=sglang_storage
        enable_cache_report tool_call_parser=None tool_server=None sampling_defaults=model""",
    ),
    (
        Ignored("there is no such log or metric; get_server_info() has the engine's counters"),
        """log_requests log_requests_level=2 log_requests_format=text log_requests_target=None
        show_time_cost enable_metrics enable_metrics_for_all_schedulers
        tokenizer_metrics_custom_labels_header=x-custom-labels
        tokenizer_metrics_allowed_custom_labels=None extra_metric_labels=None
        bucket_time_to_first_token=None bucket_inter_token_latency=None
        bucket_e2e_request_latency=None collect_tokens_histogram prompt_tokens_buckets=None
        generation_tokens_buckets=None gc_warning_threshold_secs=0.0 decode_log_interval=40
        enable_request_time_stats_logging kv_events_config=None enable_trace
        otlp_traces_endpoint=localhost:4317 export_metrics_to_file
        export_metrics_to_file_dir=None crash_dump_folder=None enable_layerwise_nvtx_marker""",
    ),
    (
        Ignored(
            "the engine is a thread of your process: there is no process to watch or to signal"
        ),
        "soft_watchdog_timeout=None custom_sigquit_handler=None",
    ),
)


def value_of(text: str) -> Any:
    """The Python literal written in `text`, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _entries() -> Iterator[tuple[str, Verdict]]:
    for verdict, names in GROUPS:
        for entry in names.split():
            name, has_default, default = entry.partition("=")
            defaults = [value_of(text) for text in default.split("|")] if has_default else [False]
            yield name, verdict._replace(defaults=tuple(defaults))


TABLE: dict[str, Verdict] = dict(_entries())


def judge(name: str, value: Any) -> None:
    """Warn or raise ValueError about an argument of `TABLE`, unless its value asks for nothing."""
    verdict = TABLE[name]
    if value is None or any(value == default for default in verdict.defaults):
        return
    if verdict.defaults[0] in (None, False) and value in (False, "", [], {}, ()):
        return
    if isinstance(verdict, Refused):
        expected = " or ".join(repr(default) for default in verdict.defaults)
        raise ValueError(f"{name}: expected {expected}, got {value!r}: {verdict.reason}")
    warnings.warn(f"{name}={value!r} is ignored: {verdict.reason}", stacklevel=4)
