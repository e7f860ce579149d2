"""A device made of lists: it runs step plans as the real one does, on pages that know what they
hold, and fails loudly where the real one would silently read or overwrite another's tokens.

The "key and value" of a position is a checksum of every token up to it, as in a model each depends
on all before. So `naive_output` is what a request must get, however it was scheduled.
"""

import zlib
from array import array
from collections.abc import Collection, Sequence
from typing import Any

from jaxengine.hidden_states import Launch, WantedStates
from jaxengine.request import Request
from jaxengine.sampling_params import SamplingParams
from jaxengine.step_plan import Row, StepPlan

VOCAB = 3  # so few that outputs meet prompts, and prefixes each other
NOTHING = -1  # what an offset of a page holds before it is written
NOT_FINITE = -1  # the token drawn from logits that are no numbers


def key_value(token: int, before: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), before)


def key_values(tokens: Sequence[int]) -> list[int]:
    """One number for each prefix of `tokens`."""
    values: list[int] = []
    for token in tokens:
        values.append(key_value(token, values[-1] if values else 0))
    return values


def next_token(value: int) -> int:
    return value % VOCAB


def naive_output(
    prompt_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int] = ()
) -> list[int]:
    """The output of one request that has a device to itself."""
    output: list[int] = []
    value = key_values(prompt_ids)[-1]
    while len(output) < max_new_tokens and not (output and output[-1] in stop_token_ids):
        output.append(next_token(value))
        value = key_value(output[-1], value)
    return output


def make_request(
    prompt_ids: Sequence[int],
    max_new_tokens: int = 8,
    *,
    rid: str = "request",
    priority: int = 0,
    stop_token_ids: Collection[int] = (),
    skips_forced: bool = False,
) -> Request:
    return Request(
        rid=rid,
        prompt_ids=array("I", prompt_ids),
        sampling=SamplingParams(max_new_tokens=max_new_tokens),
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(stop_token_ids),
        seed=0,
        priority=priority,
        matcher=object() if skips_forced else None,
        skips_forced=skips_forced,
    )


class Slot:
    """What the device remembers of one running request."""

    def __init__(self, tokens: Sequence[int], table: Sequence[int]):
        self.table = list(table)
        self.values = key_values(tokens)  # stands for the token history

    def append(self, token: int) -> None:
        self.values.append(key_value(token, self.values[-1]))


class FakeRunner:
    """Has the methods of `Runner`. Steps run when they are submitted: they run in order anyway."""

    def __init__(self, *, num_pages: int, page_size: int, num_slots: int):
        self.page_size = page_size
        self.pages: list[list[Any]] = [[NOTHING] * page_size for _ in range(num_pages + 1)]
        self.weights = 0  # which of the weights what is written comes from
        self.slots: list[Slot | None] = [None] * num_slots
        self.broken_rids: set[str] = set()  # requests whose logits are no numbers from now on
        self.is_closed = False

    def pack(self, plan: StepPlan) -> None:
        return None

    def submit(self, plan: StepPlan, packed: None = None) -> list[list[int]]:
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "two rows of a step have the same slot"
        starts = {row.request.rid: row.write_start for row in plan.rows}
        for request in plan.admitted:
            shared = len(request.path) * self.page_size
            self._install(request, starts.get(request.rid, shared))
        for row in plan.rows:
            self._set_new_page(row)
            for token in row.new_tokens:
                assert plan.pauses, "no other step takes tokens along"
                self.slot(row).append(token)
        drawn: list[list[int]] = [[] for _ in plan.rows]
        for step in range(max(plan.num_steps, 1)):
            going = [i for i, row in enumerate(plan.rows) if step < max(row.num_draws, 1)]
            for i in going:  # all rows write before any reads, as each layer does
                self._write(plan.rows[i], step)
            for i, row in enumerate(plan.rows):  # what a row that has ended draws is nonsense
                drawn[i].append(self._draw(row, step) if i in going else 0)
        return drawn

    def collect(self, submitted: list[list[int]]) -> list[list[int]]:
        return submitted

    def collect_embeddings(self, submitted: list[list[int]]) -> None:
        return None

    def collect_logprobs(self, submitted: list[list[int]]) -> tuple[None, None]:
        return None, None

    def collect_states(self, submitted: list[list[int]], wanted: WantedStates) -> Launch:
        raise AssertionError("nobody asks for any")

    def close(self) -> None:
        self.is_closed = True

    def slot(self, row: Row) -> Slot:
        slot = self.slots[row.slot]
        assert slot is not None, f"slot {row.slot} has a row but was never installed"
        return slot

    def _install(self, request: Request, start: int) -> None:
        self.slots[request.slot] = Slot(request.token_ids, request.pages)
        for page in request.pages[start // self.page_size :]:
            self._wipe(page)

    def _set_new_page(self, row: Row) -> None:
        if row.new_page:
            table = self.slot(row).table
            first = -(-row.start // self.page_size)
            assert first == len(table), "a new page begins amidst another, or behind a gap"
            table.append(row.new_page)
            self._wipe(row.new_page)

    def _wipe(self, page: int) -> None:
        assert page > 0, "page 0 is nobody's"
        self.pages[page] = [NOTHING] * self.page_size

    def _write(self, row: Row, step: int) -> None:
        slot, start = self.slot(row), row.start + step
        for position in range(start, start + row.query_len):
            page = self.pages[slot.table[position // self.page_size]]
            offset = position % self.page_size
            if position >= row.write_start:
                assert page[offset] == NOTHING, f"{row.request.rid} overwrites what is in use"
                page[offset] = slot.values[position], self.weights

    def _draw(self, row: Row, step: int) -> int:
        slot, kv_len = self.slot(row), row.start + step + row.query_len
        held = [value for page in slot.table for value in self.pages[page]]
        expected = [(value, self.weights) for value in slot.values[:kv_len]]
        assert held[:kv_len] == expected, f"{row.request.rid} reads foreign tokens"
        token = next_token(slot.values[kv_len - 1])
        if row.num_draws:
            assert kv_len == len(slot.values), "a token is drawn where the next one is known"
            slot.append(token)
        return NOT_FINITE if row.request.rid in self.broken_rids else token
