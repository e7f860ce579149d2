"""What one launch of the device does. Host only: no arrays."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxengine.hidden_states import WantedStates, merged_states
from jaxengine.logprobs import Wanted, merged
from jaxengine.request import Request

MAX_UNSENT = 16  # tokens that a row may bring along
NOBODY_ASKS = 2**31 - 1


class Row(NamedTuple):
    """`query_len` tokens of a request, from position `start`."""

    request: Request
    slot: int
    start: int
    query_len: int
    new_page: int  # the one page that the row comes to need and that is not in its table, or 0
    num_draws: int  # 0 where the next token is known; beyond 1 the row goes on from what it drew
    write_start: int = 0  # the first position whose K and V are not in the pool yet
    tell_start: int = NOBODY_ASKS  # the first position that tells of the token behind it
    new_tokens: tuple[int, ...] = ()  # the last that it reads, where only the host knows them yet

    @property
    def foreseen(self) -> int | None:
        """The token behind the row, where the host knows it already."""
        outputs = self.request.output_ids
        index = self.start + self.query_len - len(self.request.prompt_ids)
        return outputs[index] if 0 <= index < len(outputs) else None


class StepPlan(NamedTuple):
    """What one launch of the device does."""

    rows: tuple[Row, ...]
    admitted: tuple[Request, ...]  # to be installed on the device before the step
    retracted: tuple[tuple[Request, int], ...]  # and the slots that they had until now
    num_tokens: int
    num_steps: int  # of decoding, one token a row each; 0 if some row reads several at once
    wanted: Wanted | None = None  # to know of distributions
    states: WantedStates | None = None  # hidden ones
    pauses: bool = False  # between the model and the draw, for the host to have its say

    @property
    def spreads(self) -> bool:
        """Whether its tokens can stand alone, as where one decodes. Each reads its context, and
        those that come before the last of a row are too few for that to count."""
        tells_inputs = any(asked and asked.of_inputs for asked in (self.wanted, self.states))
        num_more = self.num_tokens - len(self.rows)
        return not tells_inputs and num_more <= max(MAX_UNSENT, len(self.rows))


def wanted_of(rows: Sequence[Row]) -> Wanted | None:
    """What the launch has to tell of distributions, all rows together."""
    return merged(
        (asked, asked.tells_inputs(start, start + query_len, len(request.prompt_ids)))
        for request, _, start, query_len, *_ in rows
        if (asked := request.logprobs) is not None
    )


def states_of(rows: Sequence[Row]) -> WantedStates | None:
    """The same of hidden states."""
    return merged_states(
        (asked, asked.tells_inputs(start, start + query_len))
        for request, _, start, query_len, *_ in rows
        if (asked := request.states) is not None
    )
