"""What a request asks about the distributions its tokens come from, and what it was told: books of
the host, in plain numbers. How they become dictionaries is told in `outputs`.

Terms: the entry of a token is about the distribution that it was chosen from, given all before it.
The first token of a prompt that has an entry has no number in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Wanted(NamedTuple):
    """What a step tells of distributions. Static: another choice is another program."""

    top: int  # so many of the likeliest tokens
    ids: int  # so many tokens that each row asks about
    of_inputs: bool  # of the prompts' tokens too
    is_raw: bool  # of the model's own logits, before penalties, biases and temperature


class Told(NamedTuple):
    """The numbers of one position: arrays, or what indexes like them."""

    of_token: Any
    top: Any  # [k], descending
    top_ids: Any  # [k]
    of_ids: Any  # [n]


class TokenLogprobs(NamedTuple):
    """One entry. Lists are empty where nothing of the kind was asked for."""

    token: int
    logprob: float
    top: list[tuple[float, int]]
    of_ids: list[float]


@dataclass(kw_only=True)
class Logprobs:
    """One request's."""

    start: int  # first prompt token with an entry
    num_top: int = 0
    ids: tuple[int, ...] = ()
    is_raw: bool = False
    inputs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens behind `start`
    outputs: list[TokenLogprobs] = field(default_factory=list)
    next_token: TokenLogprobs | None = None  # where none is to be generated, what might have come

    def num_reusable(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Of so many tokens, those at the front whose hidden states tell nothing (any more)."""
        is_done = len(self.inputs) == num_prompt_tokens - 1 - self.start
        return num_tokens if is_done else self.start + len(self.inputs)

    def tells_inputs(self, start: int, end: int, num_prompt_tokens: int) -> bool:
        """Whether the hidden states of positions from `start` to `end` tell of an input token."""
        return max(start, self.start) < min(end, num_prompt_tokens - 1)

    def add_inputs(self, start: int, tokens: list[int], told: Told) -> None:
        """Books what positions from `start` on tell of the `tokens` behind them, each known or
        not."""
        for offset, token in enumerate(tokens):
            if start + offset == self.start + len(self.inputs):
                self.inputs.append(self._entry(token, told, offset))

    def add_output(self, token: int, told: Told) -> None:
        self.outputs.append(self._entry(token, told, ()))

    def add_next(self, told: Told) -> None:
        """Books the distribution behind a prompt that is not continued."""
        self.next_token = self._entry(-1, told, ())

    def _entry(self, token: int, told: Told, at: Any) -> TokenLogprobs:
        top = zip(told.top[at][: self.num_top], told.top_ids[at][: self.num_top], strict=True)
        return TokenLogprobs(
            token=token,
            logprob=float(told.of_token[at]),
            top=[(float(logprob), int(each)) for logprob, each in top],
            of_ids=told.of_ids[at][: len(self.ids)].tolist(),
        )


def merged(all_asked: Iterable[tuple[Logprobs, bool]]) -> Wanted | None:
    """One choice for a batch: each row's books, and whether it tells of inputs now. Rounded up, so
    that few programs serve all."""
    wanted = None
    for asked, tells_inputs in all_asked:
        before = wanted or Wanted(0, 0, False, asked.is_raw)
        wanted = Wanted(
            top=max(before.top, _rounded_up(asked.num_top)),
            ids=max(before.ids, _rounded_up(len(asked.ids))),
            of_inputs=before.of_inputs or tells_inputs,
            is_raw=asked.is_raw,
        )
    return wanted


def _rounded_up(count: int) -> int:
    """To 0, 8, 64, 512 and so on."""
    rounded = 8 if count else 0
    while rounded < count:
        rounded *= 8
    return rounded
