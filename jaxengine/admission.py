"""From one entry of a call to a `Request` that is sure to fit the model, the context and the pool.

Everything that could fail for one prompt fails here, before anything of its call has started.
"""

import random
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np

from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.inputs import Entry
from jaxengine.logprob_inputs import AskedLogprobs, plain
from jaxengine.logprobs import Logprobs
from jaxengine.request import Request
from jaxengine.sampling_params import DefaultLength, SamplingParams
from jaxengine.state_inputs import books_of

SEED_BITS = 63


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request must fit."""

    vocab_size: int  # width of the logits
    num_layers: int
    context_length: int  # prompt and output, in tokens
    pool_tokens: int  # the whole KV pool, in tokens
    eos_token_ids: frozenset[int]
    truncates: bool  # cut what is too long instead of refusing it
    generates: bool = True  # at least one token behind the prompt
    functions: Functions = NO_FUNCTIONS  # those registered

    @property
    def max_tokens(self) -> int:
        return min(self.context_length, self.pool_tokens)

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_tokens - self.generates


def make_request(
    entry: Entry, prompt_ids: Sequence[int], limits: Limits, seeds: random.Random
) -> Request:
    """The request of an entry whose prompt has these token ids.

    Raises:
        ValueError: an empty or over-long prompt, ids outside the vocabulary, parameters that do not
        fit.
    """
    sampling = entry.sampling
    sampling.validate_for(limits.vocab_size)
    limits.functions.check(sampling, is_strict=entry.processor is None)
    prompt_ids = _checked_ids(prompt_ids, entry, limits)
    stop_ids = frozenset(sampling.stop_token_ids or ()) | limits.eos_token_ids
    seed = sampling.sampling_seed
    return Request(
        rid=entry.rid,
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_new_tokens=_max_new_tokens(sampling, len(prompt_ids), limits),
        stop_token_ids=frozenset() if sampling.ignore_eos else stop_ids,
        seed=seeds.getrandbits(SEED_BITS) if seed is None else _sample_seed(seed, entry.sample),
        priority=entry.priority,
        processor=entry.processor,
        states=entry.states and books_of(entry.states, len(prompt_ids), limits.num_layers),
        logprobs=entry.logprobs and _logprobs(entry.logprobs, len(prompt_ids), limits),
    )


def link_groups(entries: Sequence[Entry], requests: Sequence[Request]) -> None:
    """Tells requests which others they draw with: those of the same group. Of samples the first of
    one prompt goes with the first of another, and so on."""
    groups: dict[Any, list[Request]] = {}
    for entry, request in zip(entries, requests, strict=True):
        if entry.sampling.group is not None:
            groups.setdefault((entry.sampling.group, entry.sample), []).append(request)
    for group in groups.values():
        for request in group:
            request.group = tuple(group) if len(group) > 1 else ()


def _logprobs(asked: AskedLogprobs, prompt_len: int, limits: Limits) -> Logprobs:
    """The books of what is asked.

    Raises:
        ValueError: a start behind the prompt's last token, or more alternatives than there are.
    """
    start = prompt_len - 1 if asked.start_len == -1 else asked.start_len
    if start >= prompt_len:
        raise ValueError(
            f"logprob_start_len: expected less than the prompt's {prompt_len} tokens, or -1, got "
            f"{start}"
        )
    if asked.num_top > limits.vocab_size:
        raise ValueError(
            f"top_logprobs_num: expected at most {limits.vocab_size}, got {asked.num_top}"
        )
    wrong = [token for token in asked.ids if not 0 <= token < limits.vocab_size]
    if wrong:
        raise ValueError(
            f"token_ids_logprob: expected ids from 0 to {limits.vocab_size - 1}, got {wrong[0]}"
        )
    return Logprobs(start=start, num_top=asked.num_top, ids=asked.ids)


def _checked_ids(ids: Sequence[Any], entry: Entry, limits: Limits) -> array:
    field = "prompt" if entry.input_ids is None else "input_ids"
    if len(ids) == 0:
        raise ValueError(f"{field}: expected at least one token, got an empty prompt")
    packed = _packed(ids, limits.vocab_size)
    if packed is None:  # perhaps they are numbers of another library
        ids = [plain(token) for token in ids]
        packed = _packed(ids, limits.vocab_size)
    if packed is None:
        raise ValueError(f"{field}: {_wrong_id(ids, entry, limits)}")
    if len(packed) <= limits.max_prompt_tokens:
        return packed
    if limits.truncates:
        warnings.warn(
            f"{field}: a prompt of {len(ids)} tokens was cut to {limits.max_prompt_tokens}",
            stacklevel=2,
        )
        return packed[: limits.max_prompt_tokens]
    one_more = ", and at least one to generate," if limits.generates else ""
    raise ValueError(f"{field}: {len(ids)} tokens{one_more} do not fit {_limit(limits)}")


def _packed(ids: Sequence[Any], vocab_size: int) -> array | None:
    """As unsigned numbers of 32 bits; None where some of them is no id."""
    try:  # what the tokenizer gave is packed
        packed = ids if isinstance(ids, array) else array("I", ids)
    except (TypeError, OverflowError):
        return None
    numbers = np.frombuffer(packed, np.uint32)
    small = np.flatnonzero(numbers <= 1)  # which truth values pass for
    has_truths = any(type(ids[place]) is bool for place in small.tolist())
    return None if has_truths or numbers.max() >= vocab_size else packed


def _wrong_id(ids: Sequence[Any], entry: Entry, limits: Limits) -> str:
    is_number = lambda token: isinstance(token, int) and type(token) is not bool
    is_wrong = lambda token: not (is_number(token) and 0 <= token < limits.vocab_size)
    index, token = next((index, token) for index, token in enumerate(ids) if is_wrong(token))
    if entry.input_ids is None:
        return (
            f"the tokenizer made the id {token} of it, and the model's end at "
            f"{limits.vocab_size - 1}; is tokenizer_path that of this model?"
        )
    return (
        f"expected token ids from 0 to {limits.vocab_size - 1}, got {short(token)} at index {index}"
    )


def _max_new_tokens(sampling: SamplingParams, prompt_len: int, limits: Limits) -> int:
    """What was asked for; the default and None are cut to what fits."""
    room = limits.max_tokens - prompt_len
    asked = sampling.max_new_tokens
    if asked is None:
        return room
    if asked <= room or isinstance(asked, DefaultLength) or limits.truncates:
        return min(int(asked), room)
    raise ValueError(
        f"max_new_tokens: {prompt_len} prompt tokens and {asked} new ones do not fit "
        f"{_limit(limits)}"
    )


def _limit(limits: Limits) -> str:
    if limits.pool_tokens < limits.context_length:
        return (
            f"the KV pool of {limits.pool_tokens} tokens; shorten it, raise max_total_tokens, or "
            "set allow_auto_truncate"
        )
    return (
        f"the context of {limits.context_length} tokens; shorten it, raise context_length, or set "
        "allow_auto_truncate"
    )


def _sample_seed(seed: int, sample: int) -> int:
    """The first sample of a prompt has the seed asked for, the others seeds that follow from it."""
    if sample == 0:
        return seed % (1 << 64)
    return random.Random(f"{seed}/{sample}").getrandbits(SEED_BITS)
