"""What `generate` is asked to tell of distributions, for each prompt of a call."""

from reprlib import repr as short
from typing import Any, NamedTuple


class LogprobOptions(NamedTuple):
    """What `generate` is to tell of distributions, for all prompts of a call or one each."""

    return_logprob: Any = None
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None


NO_LOGPROBS = LogprobOptions()


class AskedLogprobs(NamedTuple):
    """The same for one prompt."""

    start_len: int  # -1: the last token of the prompt
    num_top: int
    ids: tuple[int, ...]


def logprobs_of(given: LogprobOptions, count: int, is_batch: bool) -> list[AskedLogprobs | None]:
    wanted = _for_each("return_logprob", given.return_logprob, False, bool, count)
    starts = _for_each("logprob_start_len", given.logprob_start_len, -1, int, count)
    tops = _for_each("top_logprobs_num", given.top_logprobs_num, 0, int, count)
    ids = _asked_ids(plain(given.token_ids_logprob), count, is_batch)
    for name, values, least in (("logprob_start_len", starts, -1), ("top_logprobs_num", tops, 0)):
        if min(values, default=least) < least:
            raise ValueError(f"{name}: expected {least} or more, got {min(values)}")
    return [AskedLogprobs(starts[i], tops[i], ids[i]) if wanted[i] else None for i in range(count)]


def _for_each(name: str, given: Any, default: Any, kind: type, count: int) -> list[Any]:
    """A value for every prompt, where one for all or a list was given."""
    given = plain(given)
    values = list(given) if isinstance(given, list | tuple) else [given] * count
    values = [default if value is None else value for value in values]
    if len(values) != count or not all(type(value) is kind for value in values):
        raise ValueError(
            f"{name}: expected {kind.__name__}, or a list of {count}, got {short(given)}"
        )
    return values


def _asked_ids(given: Any, count: int, is_batch: bool) -> list[tuple[int, ...]]:
    """Token ids to ask about: one list for all prompts, or a list of lists for a list of them."""
    if given is None:
        return [()] * count
    is_nested = isinstance(given, list | tuple) and any(
        each is None or isinstance(each, list | tuple) for each in given
    )
    lists = [each or () for each in given] if is_nested else [given] * count
    if len(lists) != count or (is_nested and not is_batch) or not all(map(_is_ids, lists)):
        raise ValueError(
            "token_ids_logprob: expected a list of token ids, or for a list of prompts one such "
            f"list each, got {short(given)}"
        )
    return [tuple(each) for each in lists]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(each) is int for each in value)


def plain(value: Any) -> Any:
    """Python's own numbers and lists instead of those of NumPy, JAX and others."""
    return value.tolist() if hasattr(value, "tolist") else value
