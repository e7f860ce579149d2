"""Arguments of a call that are not among its own: those of SGLang's that ask for what there is not,
and those that never were."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.sampling_params import OTHER_SPELLINGS, SamplingParams

UNAVAILABLE = {
    "image_data": "images are",
    "audio_data": "audio is",
    "video_data": "video is",
    "mm_hashes": "images are",
    "mm_content_hashes": "images are",
    "lora_path": "LoRA is",
    "require_reasoning": "parsing of reasoning is",
    "return_routed_experts": "routing of experts is",
    "routed_experts_start_len": "routing of experts is",
    "bootstrap_host": "prefill/decode disaggregation is",
    "bootstrap_port": "prefill/decode disaggregation is",
    "bootstrap_room": "prefill/decode disaggregation is",
    "disagg_prefill_dp_rank": "prefill/decode disaggregation is",
    "data_parallel_rank": "data parallelism is",
    "routed_dp_rank": "data parallelism is",
    "external_trace_header": "tracing is",
    "cache_salt": "separation of caches is",
    "kv_hints": "advice to the cache is",
}
"""Arguments of SGLang's `generate` whose feature does not exist yet: asking for one is an error."""

WITHOUT_EFFECT = {
    "session_id": "prefixes are shared by what they hold, so a name of their conversation changes "
    "nothing; to go on from a turn of an open session pass session_params"
}
"""Arguments that only advise what is not here, and why: they are ignored with a warning."""

AVAILABLE = (
    "prompt",
    "sampling_params",
    "input_ids",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "custom_logit_processor",
    "return_hidden_states",
    "stream",
    "rid",
    "priority",
    "session_params",
)


def refuse_unavailable(
    arguments: Mapping[str, Any], method: str = "generate", available: Sequence[str] = AVAILABLE
) -> None:
    """Raises for arguments that do not exist, and for those that ask for what does not yet."""
    for name, value in arguments.items():
        if name in WITHOUT_EFFECT:
            if value is not None:
                warnings.warn(f"{name} is ignored: {WITHOUT_EFFECT[name]}", stacklevel=4)
            continue
        if name not in UNAVAILABLE:
            way_out = _way_out(name, available)
            raise TypeError(f"{method}() got an unexpected argument {name!r}; {way_out}")
        if _asks_for_something(name, value):
            raise ValueError(f"{name}: {UNAVAILABLE[name]} not available yet; leave it out")


def _way_out(name: str, available: Sequence[str]) -> str:
    if (
        "sampling_params" in available
        and name in SamplingParams.__dataclass_fields__
        or name in OTHER_SPELLINGS
    ):
        own = OTHER_SPELLINGS.get(name, name)
        return f"it is a sampling parameter: sampling_params={{{own!r}: ...}}"
    close = difflib.get_close_matches(name, [*available, *UNAVAILABLE], 1)
    return f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(available)}"


def _asks_for_something(name: str, value: Any) -> bool:
    """False for the defaults, alone or in a list, which callers may write out."""
    if isinstance(value, list | tuple):
        return any(_asks_for_something(name, each) for each in value)
    if isinstance(value, bool | int | str | dict):
        return bool(value)
    return value is not None
