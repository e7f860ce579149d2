"""The arguments of an engine, by SGLang's names, and their validation. Plain data: it imports no
jax and does not know what the values lead to."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxengine.arguments import (
    argument,
    check,
    converted,
    json_object,
    kind_of,
    option,
    option_settings,
)
from jaxengine.sglang_arguments import TABLE, judge, value_of

FUNCTION_ARGUMENTS = ("logits_processors", "sampler", "interventions")
"""What `Engine` takes beside these: functions, which no command line could name."""

ALIASES = {  # later names of the same arguments
    "cuda_graph_max_bs_decode": "cuda_graph_max_bs",
    "cuda_graph_bs_decode": "cuda_graph_bs",
}


@dataclass(frozen=True, kw_only=True)
class _Fields:
    # model
    model_path: str | None = argument(
        None, "folder or Hugging Face id; default: the embedded model"
    )
    tokenizer_path: str | None = argument(None, "folder or Hugging Face id; default: the model's")
    tokenizer_mode: str = argument(
        "auto",
        "kind of tokenizer",
        choices=("auto",),
        otherwise="only fast tokenizers are used; save the tokenizer as tokenizer.json",
    )
    skip_tokenizer_init: bool = argument(False, "token ids in, token ids out; no text")
    load_format: str = argument(
        "auto",
        "safetensors files, or random weights made on the device (dummy)",
        choices=("auto", "safetensors", "dummy"),
        otherwise="other formats can run code when opened; convert with save_pretrained()",
    )
    is_embedding: bool = argument(False, "embeddings of a model that could generate")
    revision: str | None = argument(None, "branch, tag or commit on the Hugging Face hub")
    download_dir: str | None = argument(None, "folder that the hub's files are downloaded to")
    dtype: str = argument(
        "auto",
        "of weights and activations; auto: the checkpoint's",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
        otherwise="quantized types are not available yet",
    )
    context_length: int | None = argument(
        None, "tokens of prompt and output; default: the model's", low=1
    )
    json_model_override_args: str = argument(
        "{}", "JSON object merged over the model's config.json"
    )
    preferred_sampling_params: str | None = argument(
        None, "JSON object merged under each request's"
    )
    served_model_name: str | None = argument(None, "name to report; default: model_path")
    weight_version: str = argument("default", "label of the weights, reported with each output")

    # memory and scheduling
    device: str | None = argument(
        None,
        "default: a GPU where there is one",
        choices=("cpu", "cuda", "gpu"),
        otherwise="other devices are not available",
    )
    mem_fraction_static: float | None = argument(
        None, "share of GPU memory for weights and KV cache"
    )
    max_total_tokens: int | None = argument(None, "size of the KV cache; default: what fits", low=1)
    max_running_requests: int | None = argument(None, "requests that run at a time", low=1)
    max_queued_requests: int | None = argument(None, "requests that wait at most", low=1)
    enable_weights_cpu_backup: bool = argument(
        False, "keep released weights in host memory, and bring them back when resumed"
    )
    page_size: int = argument(64, "tokens of a page of the KV cache", low=1)
    chunked_prefill_size: int | None = argument(
        None, "prompt tokens of a step at most; -1: no chunks"
    )
    max_prefill_tokens: int = argument(
        16384, "prompt tokens of a step when prompts are not chunked", low=1
    )
    schedule_policy: str = argument(
        "fcfs",
        "order of waiting requests",
        choices=("fcfs", "lpm", "random", "lof", "priority"),
        otherwise="for shared prefixes take lpm",
    )
    schedule_conservativeness: float = argument(1.0, "above 1: admit fewer, retract less", low=0)
    enable_priority_scheduling: bool = argument(False, "order requests by their priority first")
    schedule_low_priority_values_first: bool = argument(False, "the lower the number, the earlier")
    disable_radix_cache: bool = argument(False, "do not share prefixes between requests")
    enable_mixed_chunk: bool = argument(True, "prefill and decode in one step")
    disable_overlap_schedule: bool = argument(False, "wait for each step before planning the next")
    allow_auto_truncate: bool = argument(
        False, "cut prompts that are too long instead of refusing them"
    )

    # structured output
    grammar_backend: str = argument(
        "auto",
        "library of structured output",
        choices=("auto", "llguidance"),
        otherwise="there is one; leave it out",
    )
    constrained_json_whitespace_pattern: str | None = argument(
        None, "expression for the whitespace between JSON's tokens; default: any"
    )
    constrained_json_disable_any_whitespace: bool = argument(
        False, "no whitespace between JSON's tokens"
    )

    # compiled steps
    cuda_graph_max_bs: int | None = argument(None, "largest compiled batch of decode steps", low=1)
    cuda_graph_bs: tuple[int, ...] | None = argument(
        None, "all compiled batches of decode steps", low=1
    )
    num_continuous_decode_steps: int | None = argument(
        None, "tokens a request that does not stream gets in one launch; default: 8 on a GPU", low=1
    )
    attention_backend: str | None = argument(
        None,
        "kernels of attention and what is fused with it; xla: none, the reference",
        choices=("mosaic", "triton", "xla"),
        otherwise="leave it out for the fastest that fits the device",
    )

    # output
    stream_interval: int = argument(1, "tokens between chunks of a stream", low=1)
    stream_output: bool = argument(
        False, "chunks carry only their own output_ids; text is cumulative"
    )
    incremental_streaming_output: bool = argument(
        False, "chunks carry only their own text and output_ids"
    )
    logprobs_mode: str = argument(
        "processed_logprobs",
        "of output tokens: after penalties, biases and temperature, or before",
        choices=("processed_logprobs", "raw_logprobs"),
        otherwise="prompts always have raw ones",
    )
    random_seed: int | None = argument(
        None, "seed of requests without one; default: a random one", low=0
    )
    watchdog_timeout: float = argument(
        300.0, "seconds after which a step that hangs is reported", low=0
    )
    log_level: str = argument(
        "error",
        "of the engine's logger",
        choices=("debug", "info", "warning", "error", "critical"),
        otherwise="these are the levels of the logging module",
    )
    show_progress: bool = argument(True, "progress bars while loading and compiling")

    def __post_init__(self) -> None:
        for name, field in _FIELDS.items():
            check(field, _KINDS[name], getattr(self, name))
        share = self.mem_fraction_static
        if share is not None and not 0 < share < 1:
            raise ValueError(
                f"mem_fraction_static: expected a number between 0 and 1, got {share}; "
                "0.9 suits a GPU that nothing else uses"
            )
        chunk = self.chunked_prefill_size
        if chunk is not None and chunk != -1 and chunk < 1:
            raise ValueError(
                f"chunked_prefill_size: expected at least 1, or -1 for none, got {chunk}"
            )
        steps = self.num_continuous_decode_steps
        if steps is not None and steps > self.page_size:
            raise ValueError(
                f"num_continuous_decode_steps: expected at most page_size = {self.page_size}, got "
                f"{steps}; a launch gives a request one new page at most"
            )
        if self.max_total_tokens is not None and self.max_total_tokens < self.page_size:
            raise ValueError(
                f"max_total_tokens: expected at least one page of {self.page_size} tokens, "
                f"got {self.max_total_tokens}; raise it or lower page_size"
            )
        pattern = self.constrained_json_whitespace_pattern
        if pattern is not None and self.constrained_json_disable_any_whitespace:
            raise ValueError(
                f"constrained_json_whitespace_pattern: expected none, got {pattern!r}, as "
                "constrained_json_disable_any_whitespace is set; leave out one of them"
            )
        json_object("json_model_override_args", self.json_model_override_args)
        json_object("preferred_sampling_params", self.preferred_sampling_params or "{}")


class ServerArgs(_Fields):
    """Arguments of an engine: `ServerArgs(model_path="...", page_size=32)`.

    Takes every argument of SGLang's class of that name. The fields are implemented; the others are
    ignored with a warning or refused, as `sglang_arguments.TABLE` says for each.

    Raises: ValueError for a value that cannot be had, TypeError for a name that does not exist.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**dict(_recognized(arguments)))

    @classmethod
    def from_kwargs(cls, arguments: Mapping[str, Any]) -> "ServerArgs":
        return cls(**arguments)

    @property
    def model_overrides(self) -> dict[str, Any]:
        return json_object("json_model_override_args", self.json_model_override_args)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        return json_object("preferred_sampling_params", self.preferred_sampling_params or "{}")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """An option for each field, and hidden ones for what is only ignored or refused."""
        for name, field in _FIELDS.items():
            later = [option(alias) for alias, own in ALIASES.items() if own == name]
            short = ["--model"] if name == "model_path" else []
            settings = option_settings(field, _KINDS[name])
            parser.add_argument(option(name), *later, *short, **settings)
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        for name, verdict in TABLE.items():
            is_flag = verdict.defaults[0] is False
            form: dict[str, Any] = {"action": "store_true"} if is_flag else {"type": value_of}
            parser.add_argument(option(name), **form, **hidden)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "ServerArgs":
        """From parsed options; those that are no argument of an engine are left alone."""
        known = {*_FIELDS, *TABLE}
        return cls(**{name: value for name, value in vars(args).items() if name in known})


_FIELDS = {field.name: field for field in dataclasses.fields(_Fields)}
_KINDS = {name: kind_of(hint) for name, hint in typing.get_type_hints(_Fields).items()}


def _recognized(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that are fields, converted to the fields' types; the others are judged."""
    for name, value in arguments.items():
        own = ALIASES.get(name, name)
        if own != name and own in arguments:
            raise TypeError(f"{name} and {own} are one argument; give it once")
        if own in _FIELDS:
            if value is not None:  # in SGLang None stands for the default, whatever the type
                yield own, converted(_KINDS[own], value)
        elif name in TABLE:
            judge(name, value)
        else:
            known = [*_FIELDS, *TABLE, *ALIASES, *FUNCTION_ARGUMENTS]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name!r} is not an argument of the engine{hint}")
