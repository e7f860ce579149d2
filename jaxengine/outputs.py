"""The dictionaries that users get: results, stream chunks, finish reasons.

Pure functions over plain values; the names and their meaning are those of SGLang's `Engine`. They
know neither requests nor the tokenizer.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from jaxengine.logprobs import Entries, Logprobs

FinishReason = dict[str, Any]


def length_reason(length: int) -> FinishReason:
    """All of the `length` new tokens that were allowed have come."""
    return {"type": "length", "length": length}


def stop_reason(matched: int | str) -> FinishReason:
    """A stop occurred: the id of a token, a stop string, or the pattern of a stop expression."""
    return {"type": "stop", "matched": matched}


def not_finite_reason() -> FinishReason:
    """The model gave logits that are no numbers."""
    return stop_reason("NaN happened")


def abort_reason(
    message: str, *, status_code: int | None = None, err_type: str | None = None
) -> FinishReason:
    """The request was given up. The HTTP status and error class are there where they are known."""
    details = {"status_code": status_code, "err_type": err_type}
    known = {name: value for name, value in details.items() if value is not None}
    return {"type": "abort", "message": message} | known


def bad_request_reason(message: str) -> FinishReason:
    """The request turned out to ask for something that cannot be done."""
    return abort_reason(message, status_code=400, err_type="BadRequestError")


def spoken_ids(
    output_ids: Sequence[int],
    finish_reason: Mapping[str, Any] | None,
    *,
    no_stop_trim: bool = False,
) -> Sequence[int]:
    """The ids whose text is shown: without the token that stopped the request, unless it is kept.

    It stays in `output_ids`, and is counted.
    """
    by_token = finish_reason is not None and isinstance(finish_reason.get("matched"), int)
    return output_ids[:-1] if by_token and not no_stop_trim else output_ids


def result(
    *,
    rid: str,
    text: str | None,
    output_ids: Sequence[int],
    finish_reason: Mapping[str, Any] | None,
    prompt_tokens: int,
    cached_tokens: int,
    total_retractions: int = 0,
    weight_version: str = "default",
    e2e_latency: float | None = None,
    sent_at: float | None = None,
    index: int | None = None,
    text_start: int = 0,
    ids_start: int = 0,
    logprobs: Mapping[str, Any] | None = None,
    hidden_states: Any = None,
) -> dict[str, Any]:
    """One result, or one chunk of a stream (`finish_reason` None but for the last).

    `text` is None where there is no tokenizer. `text_start` and `ids_start` are what earlier chunks
    have said already: 0 makes cumulative chunks; `completion_tokens` is cumulative in any case.
    `e2e_latency` is in seconds and `sent_at` in seconds since the epoch, each given once a request.
    `index` is the place in the batch of a streamed batch, None elsewhere. `logprobs` are what
    `logprob_lists` gives.
    """
    meta_info = {
        "id": rid,
        "finish_reason": None if finish_reason is None else dict(finish_reason),
        "prompt_tokens": prompt_tokens,
        "weight_version": weight_version,
        "total_retractions": total_retractions,
        "completion_tokens": len(output_ids),
        "cached_tokens": cached_tokens,
    }
    if logprobs is not None:
        meta_info |= logprobs
    if hidden_states is not None:
        meta_info["hidden_states"] = hidden_states
    if e2e_latency is not None:
        meta_info["e2e_latency"] = e2e_latency
    if sent_at is not None:
        meta_info["response_sent_to_client_ts"] = sent_at
    out = {} if text is None else {"text": text[text_start:]}
    out |= {"output_ids": list(output_ids[ids_start:]), "meta_info": meta_info}
    return out if index is None else out | {"index": index}


def embedding_result(
    *,
    rid: str,
    embedding: Any,
    finish_reason: Mapping[str, Any] | None,
    prompt_tokens: int,
    total_retractions: int,
    weight_version: str,
    e2e_latency: float,
) -> dict[str, Any]:
    """The result of a sequence that was not to be continued; `e2e_latency` is in seconds."""
    meta_info = {
        "id": rid,
        "finish_reason": None if finish_reason is None else dict(finish_reason),
        "prompt_tokens": prompt_tokens,
        "weight_version": weight_version,
        "total_retractions": total_retractions,
        "e2e_latency": e2e_latency,
    }
    return {"embedding": embedding, "meta_info": meta_info}


def logprob_lists(
    asked: Logprobs, prompt_ids: Sequence[int], num_outputs: int, outputs_start: int = 0
) -> dict[str, list[Any]]:
    """The lists of log-probabilities in `meta_info`, by SGLang's names.

    Entries are `(logprob, token id, None)`; the first of a prompt's has no logprob, and in the
    other lists None stands in its place. Of a prompt that is not continued, those of outputs have
    one entry, for the token that would come. `outputs_start` as in `result`.
    """
    inputs = asked.inputs
    outputs = asked.next_token or asked.outputs.part(outputs_start, num_outputs)
    lists: dict[str, list[Any]] = {
        "input_token_logprobs": [(None, prompt_ids[asked.start], None), *_of_tokens(inputs)],
        "output_token_logprobs": _of_tokens(outputs),
    }
    if asked.num_top:
        lists["input_top_logprobs"] = [None, *_of_top(inputs)]
        lists["output_top_logprobs"] = _of_top(outputs)
    if asked.ids:
        lists["input_token_ids_logprobs"] = [None, *_of_ids(inputs, asked.ids)]
        lists["output_token_ids_logprobs"] = _of_ids(outputs, asked.ids)
    return lists


def _of_tokens(entries: Entries) -> list[Any]:
    return list(zip(_finite(entries.logprobs), entries.tokens, repeat(None)))


def _of_top(entries: Entries) -> list[Any]:
    return [[(_finite([logprob])[0], token, None) for logprob, token in top] for top in entries.top]


def _of_ids(entries: Entries, ids: Sequence[int]) -> list[Any]:
    return [list(zip(_finite(each), ids, repeat(None))) for each in entries.of_ids]


def _finite(logprobs: list[float]) -> list[float]:
    """JSON knows no infinity."""
    if all(map(math.isfinite, logprobs)):
        return logprobs
    return [each if math.isfinite(each) else -sys.float_info.max for each in logprobs]
