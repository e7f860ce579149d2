"""From the arguments of a generate call to one entry per wanted sample, in order, or an error that
names the argument. It knows lists and dictionaries; tokens are counted and checked against limits
in `admission`.
"""

import uuid
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

from jaxengine.logit_processor import CustomLogitProcessor, processors_of
from jaxengine.logprob_inputs import (
    NO_LOGPROBS,
    AskedLogprobs,
    LogprobOptions,
    logprobs_of,
    plain,
)
from jaxengine.sampling_params import SamplingParams
from jaxengine.state_inputs import AskedStates, states_of

PLAIN = frozenset({bool, float, int, str, type(None)})
"""Types whose equal values are the same in every respect."""


class Entry(NamedTuple):
    """One sample to be generated."""

    text: str | None
    input_ids: Sequence[Any] | None  # verbatim; wins over the text
    sampling: SamplingParams
    rid: str
    priority: int
    sample: int  # 0 .. n-1: which of the prompt's samples
    logprobs: AskedLogprobs | None = None
    processor: CustomLogitProcessor | None = None
    states: AskedStates | None = None


class Inputs(NamedTuple):
    entries: list[Entry]
    is_batch: bool  # a list goes in, or n > 1: a list comes out


def normalise(
    prompt: str | Sequence[str] | None,
    sampling_params: Any,
    input_ids: Sequence[Any] | None,
    *,
    rid: str | Sequence[str] | None = None,
    priority: int | Sequence[int] | None = None,
    defaults: Mapping[str, Any],
    logprobs: LogprobOptions = NO_LOGPROBS,
    processor: Any = None,
    states: Any = None,
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
    asked = logprobs_of(logprobs, len(texts), is_batch)
    processors = processors_of(processor, len(texts))
    asked_states = states_of(states, len(texts))
    entries = [
        Entry(
            texts[i],
            ids[i],
            params[i],
            rids[i * n + sample],
            priorities[i],
            sample,
            asked[i],
            processors[i],
            asked_states[i],
        )
        for i in range(len(texts))
        for sample in range(n)
    ]
    return Inputs(entries, is_batch or n > 1)


def _prompts(
    prompt: Any, input_ids: Any
) -> tuple[Sequence[str | None], Sequence[Sequence[Any] | None], bool]:
    """The texts and the ids of the prompts, either None where it was not given; is it a list?"""
    if input_ids is None:
        if prompt is None:
            raise ValueError("prompt: expected a prompt, or token ids as input_ids; got neither")
        texts, is_batch = _texts(prompt)
        return texts, [None] * len(texts), is_batch
    ids, is_batch = _id_lists(input_ids)
    if prompt is None:
        return [None] * len(ids), ids, is_batch
    texts, has_texts = _texts(prompt)
    if (len(texts), has_texts) != (len(ids), is_batch):
        of_text, of_ids = _counted(len(texts), has_texts), _counted(len(ids), is_batch)
        raise ValueError(f"input_ids: expected {of_text} as in prompt, got {of_ids}")
    return texts, ids, is_batch


def _counted(count: int, is_batch: bool) -> str:
    return f"a list of {count}" if is_batch else "a single one"


def _texts(prompt: Any) -> tuple[list[str], bool]:
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt: expected a string or a list of strings, got {short(prompt)}")
    for index, text in enumerate(prompt):
        if not isinstance(text, str):
            is_ids, is_chat = isinstance(text, int | list | tuple), isinstance(text, Mapping)
            way_out = "; pass token ids as input_ids" if is_ids else ""
            way_out = "; render a chat with tokenizer.apply_chat_template" if is_chat else way_out
            raise ValueError(
                f"prompt: expected strings, got {short(text)} at index {index}{way_out}"
            )
    return list(prompt), True


def _id_lists(input_ids: Any) -> tuple[list[Sequence[Any]], bool]:
    """Lists of ids. Arrays become lists; whether their elements are ids is seen later."""
    rows = plain(input_ids)
    if not isinstance(rows, list | tuple):
        raise ValueError(
            f"input_ids: expected a list of token ids, or of such lists, got {short(input_ids)}"
        )
    rows = [plain(row) for row in rows]
    if not any(isinstance(row, list | tuple) for row in rows):
        return [rows], False
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise ValueError(
                f"input_ids: expected a list for every prompt, got {short(row)} at index {index}"
            )
    return rows, True


def _sampling(given: Any, count: int, defaults: Mapping[str, Any]) -> list[SamplingParams]:
    if not isinstance(given, list | tuple):
        return [_one_sampling(given, defaults)] * count
    if len(given) != count:
        raise ValueError(
            f"sampling_params: expected one dict, or {count}, one per prompt; got {len(given)}"
        )
    known: dict[Any, SamplingParams] = {}  # most calls have few different ones, often one
    params = []
    for index, each in enumerate(given):
        key = _key_of(each)
        try:
            one = known.get(key) or _one_sampling(each, defaults)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {index}: {error}") from None
        if key is not None:
            known[key] = one
        params.append(one)
    return params


def _key_of(given: Any) -> Any:
    """Equal for dictionaries that are so in every respect; None for what that is not known of."""
    if type(given) is not dict or not PLAIN.issuperset(map(type, given.values())):
        return None
    return tuple((name, type(value), value) for name, value in given.items())


def _one_sampling(given: Any, defaults: Mapping[str, Any]) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"sampling_params: expected a dict or SamplingParams, got {short(given)}")
    return SamplingParams.from_dict({**defaults, **(given or {})})


def _rids(rid: Any, count: int, n: int, is_batch: bool) -> list[str]:
    """A name for each sample: what was given, with the index of the prompt and that of the sample
    where there are several."""
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count * n)]
    if isinstance(rid, str):
        names = [f"{rid}_{index}" for index in range(count)] if is_batch else [rid]
    elif not isinstance(rid, list | tuple) or not all(isinstance(each, str) for each in rid):
        raise ValueError(f"rid: expected a string or a list of strings, got {short(rid)}")
    elif len(rid) != count or len(set(rid)) != count:
        raise ValueError(
            f"rid: expected {count} different strings, one per prompt, got {short(rid)}"
        )
    else:
        names = list(rid)
    return names if n == 1 else [f"{name}_{sample}" for name in names for sample in range(n)]


def _priorities(priority: Any, count: int) -> list[int]:
    default = 0 if priority is None else priority
    priorities = list(default) if isinstance(default, list | tuple) else [default] * count
    if len(priorities) != count or not all(type(each) is int for each in priorities):
        raise ValueError(f"priority: expected an int, or {count} of them, got {short(priority)}")
    return priorities
