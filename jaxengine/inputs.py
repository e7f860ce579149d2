"""From the arguments of a generate call to one entry per wanted sample, in order, or an error that
names the argument. It knows lists and dictionaries; tokens are counted and checked against limits
in `admission`.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.sampling_params import SamplingParams

UNAVAILABLE = {
    "image_data": "images are",
    "audio_data": "audio is",
    "video_data": "video is",
    "return_logprob": "log-probabilities are",
    "logprob_start_len": "log-probabilities are",
    "top_logprobs_num": "log-probabilities are",
    "token_ids_logprob": "log-probabilities are",
    "lora_path": "LoRA is",
    "custom_logit_processor": "custom logit processors are",
    "return_hidden_states": "hidden states are",
    "return_routed_experts": "routing of experts is",
    "bootstrap_host": "prefill/decode disaggregation is",
    "bootstrap_port": "prefill/decode disaggregation is",
    "bootstrap_room": "prefill/decode disaggregation is",
    "data_parallel_rank": "data parallelism is",
    "external_trace_header": "tracing is",
    "session_params": "sessions are",
}
"""Arguments of `generate` whose feature does not exist yet: asking for one is an error."""


class Entry(NamedTuple):
    """One sample to be generated."""

    text: str | None
    input_ids: list[int] | None  # verbatim; wins over the text
    sampling: SamplingParams
    rid: str
    priority: int
    sample: int  # 0 .. n-1: which of the prompt's samples


class Inputs(NamedTuple):
    entries: list[Entry]
    is_batch: bool  # a list goes in, or n > 1: a list comes out


def normalise(
    prompt: str | Sequence[str] | None,
    sampling_params: Any,
    input_ids: Sequence[Any] | None,
    rid: str | Sequence[str] | None,
    priority: int | Sequence[int] | None,
    defaults: Mapping[str, Any],
) -> Inputs:
    """The samples asked for: prompts in order, the `n` of each one after the other.

    Raises:
        ValueError, TypeError: naming the argument at fault. Nothing has been started then.
    """
    texts, ids, is_batch = _prompts(prompt, input_ids)
    params = _sampling(sampling_params, len(texts), defaults)
    n = params[0].n if params else 1
    if any(each.n != n for each in params):
        counts = sorted({each.n for each in params})
        raise ValueError(f"n: expected the same number for every prompt of a call, got {counts}")
    rids = _rids(rid, len(texts), n, is_batch)
    priorities = _priorities(priority, len(texts))
    entries = [
        Entry(texts[i], ids[i], params[i], rids[i * n + sample], priorities[i], sample)
        for i in range(len(texts))
        for sample in range(n)
    ]
    return Inputs(entries, is_batch or n > 1)


def refuse_unavailable(arguments: Mapping[str, Any]) -> None:
    """ValueError for the first argument that asks for what does not exist yet."""
    for name, value in arguments.items():
        if name not in UNAVAILABLE:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False and value != 0 and value != []:
            raise ValueError(f"{name}: {UNAVAILABLE[name]} not available yet; leave it out")


def _prompts(prompt: Any, input_ids: Any) -> tuple[list[str | None], list[Any], bool]:
    if prompt is None and input_ids is None:
        raise ValueError("prompt: expected a prompt, or token ids as input_ids; got neither")
    if prompt is not None and not isinstance(prompt, str | list | tuple):
        raise ValueError(f"prompt: expected a string or a list of strings, got {prompt!r}")
    is_batch = isinstance(prompt, list | tuple)
    texts = list(prompt) if is_batch else [prompt]
    for index, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt: expected strings, got {text!r} at index {index}")
    if input_ids is None:
        return texts, [None] * len(texts), is_batch
    ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if not isinstance(ids, list | tuple):
        raise ValueError(f"input_ids: expected a list of token ids, or of such lists, got {ids!r}")
    if prompt is None:
        is_batch = len(ids) > 0 and isinstance(ids[0], list | tuple)
        texts = [None] * (len(ids) if is_batch else 1)
    ids = list(ids) if is_batch else [ids]
    if len(ids) != len(texts):
        raise ValueError(f"input_ids: expected {len(texts)} lists, one per prompt, got {len(ids)}")
    return texts, ids, is_batch


def _sampling(given: Any, count: int, defaults: Mapping[str, Any]) -> list[SamplingParams]:
    if not isinstance(given, list | tuple):
        return [_one_sampling(given, defaults)] * count
    if len(given) != count:
        raise ValueError(
            f"sampling_params: expected one dict, or {count}, one per prompt; got {len(given)}"
        )
    return [_one_sampling(each, defaults) for each in given]


def _one_sampling(given: Any, defaults: Mapping[str, Any]) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"sampling_params: expected a dict or SamplingParams, got {given!r}")
    return SamplingParams.from_dict({**defaults, **(given or {})})


def _rids(rid: Any, count: int, n: int, is_batch: bool) -> list[str]:
    if rid is None or n > 1:  # samples of one prompt need names of their own
        return [uuid.uuid4().hex for _ in range(count * n)]
    if isinstance(rid, str):
        return [f"{rid}_{index}" for index in range(count)] if is_batch else [rid]
    if not isinstance(rid, list | tuple) or not all(isinstance(each, str) for each in rid):
        raise ValueError(f"rid: expected a string or a list of strings, got {rid!r}")
    if len(rid) != count or len(set(rid)) != count:
        raise ValueError(f"rid: expected {count} different strings, one per prompt, got {rid!r}")
    return list(rid)


def _priorities(priority: Any, count: int) -> list[int]:
    priorities = list(priority) if isinstance(priority, list | tuple) else [priority or 0] * count
    if len(priorities) != count or not all(type(each) is int for each in priorities):
        raise ValueError(f"priority: expected an int, or {count} of them, got {priority!r}")
    return priorities
