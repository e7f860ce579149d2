"""What a request asks about the distributions its tokens come from, and what it was told: books of
the host, in plain numbers. How they become dictionaries is told in `outputs`.

Terms: the entry of a token is about the distribution that it was chosen from, given all before it.
The first token of a prompt that has an entry has no number in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Wanted(NamedTuple):
    """What a step tells of distributions. Static: another choice is another program."""

    top: int  # so many of the likeliest tokens
    ids: int  # so many tokens that each row asks about
    of_inputs: bool  # of the prompts' tokens too


class Told(NamedTuple):
    """The numbers of some positions: float32 arrays on the device, or of NumPy."""

    of_token: Any  # [positions]
    top: Any  # [positions, k], descending
    top_ids: Any  # [positions, k] int32
    of_ids: Any  # [positions, n]


@dataclass
class Entries:
    """Of some tokens, in order: a list for each kind of number. `top` and `of_ids` are empty where
    nothing of the kind was asked for."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    of_ids: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(
        self, tokens: Sequence[int], told: Told, where: Any, num_top: int, num_ids: int
    ) -> None:
        """All at once: of a long prompt every token has an entry. `where` is the index of theirs
        among the positions told of."""
        self.logprobs += told.of_token[where].tolist()
        if num_top:
            both = (array[where][:, :num_top].tolist() for array in (told.top, told.top_ids))
            self.top += [list(zip(*each, strict=True)) for each in zip(*both, strict=True)]
        if num_ids:
            self.of_ids += told.of_ids[where][:, :num_ids].tolist()
        self.tokens += tokens  # last: who reads from another thread counts these

    def part(self, start: int, end: int) -> "Entries":
        return Entries(
            self.tokens[start:end],
            self.logprobs[start:end],
            self.top[start:end],
            self.of_ids[start:end],
        )


@dataclass(kw_only=True)
class Logprobs:
    """One request's."""

    start: int  # first prompt token with an entry
    num_top: int = 0
    ids: tuple[int, ...] = ()
    inputs: Entries = field(default_factory=Entries)  # of the tokens behind `start`
    outputs: Entries = field(default_factory=Entries)
    next_token: Entries | None = None  # where none is to be generated, what might have come

    def num_reusable(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Of so many tokens, those at the front whose hidden states tell nothing (any more)."""
        is_done = len(self.inputs) == num_prompt_tokens - 1 - self.start
        return num_tokens if is_done else self.start + len(self.inputs)

    def tells_inputs(self, start: int, end: int, num_prompt_tokens: int) -> bool:
        """Whether the hidden states of positions from `start` to `end` tell of an input token."""
        return max(start, self.start) < min(end, num_prompt_tokens - 1)

    def add_inputs(self, start: int, tokens: Sequence[int], told: Told, first: int) -> None:
        """Books what positions from `start` on, of which `told` has the first at `first`, tell of
        the `tokens` behind them, as far as it is asked for and not known."""
        known = self.start + len(self.inputs) - start
        where = slice(first + known, first + len(tokens))
        self._extend(self.inputs, tokens[known:], told, where)

    def add_outputs(self, tokens: Sequence[int], told: Told, index: int) -> None:
        """Books what the first steps of a launch tell of its row `index`."""
        self._extend(self.outputs, tokens, told, (slice(len(tokens)), index))

    def add_next(self, token: int, told: Told, index: int) -> None:
        """Books what would come behind a prompt that is not continued."""
        self.next_token = Entries()
        self._extend(self.next_token, [token], told, (slice(1), index))

    def _extend(self, entries: Entries, tokens: Sequence[int], told: Told, where: Any) -> None:
        entries.extend(tokens, told, where, self.num_top, len(self.ids))


def merged(all_asked: Iterable[tuple[Logprobs, bool]]) -> Wanted | None:
    """One choice for a batch: each row's books, and whether it tells of inputs now. Rounded up, so
    that few programs serve all."""
    wanted = None
    for asked, tells_inputs in all_asked:
        top, ids, of_inputs = wanted or (0, 0, False)
        wanted = Wanted(
            top=max(top, _rounded_up(asked.num_top)),
            ids=max(ids, _rounded_up(len(asked.ids))),
            of_inputs=of_inputs or tells_inputs,
        )
    return wanted


def _rounded_up(count: int) -> int:
    """To 0, 1, 8, 64, 512 and so on."""
    rounded = min(count, 1)
    while rounded < count:
        rounded *= 8
    return rounded
