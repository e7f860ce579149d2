"""What a request asks about hidden states, and what it was given: books of the host. The values
stay on the device until somebody looks at them, or too many have gathered there.

The states of a request are those of the tokens that were read: its prompt, and its output but for
the last token.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

PlaceName = tuple[str, int | None]  # as `models.taps` names them

MAX_DEVICE_BYTES = 256 << 20  # of states that nobody has looked at; older ones go to the host


class WantedStates(NamedTuple):
    """What a step tells of hidden states. Static: another choice is another program."""

    places: tuple[PlaceName, ...]
    of_inputs: bool  # of all tokens read, not of each row's last alone


class Launch:
    """What one launch gave: `last [steps, places, rows, D]`, and of all tokens it read
    `of_inputs [places, T, D]` or None. Arrays of the device, or of NumPy."""

    def __init__(self, places: tuple[PlaceName, ...], last: Any, of_inputs: Any):
        self.places = places
        self._arrays = last, of_inputs
        self.has_inputs = of_inputs is not None
        self.num_bytes = sum(array.nbytes for array in self._arrays if array is not None)

    def to_host(self) -> tuple[Any, Any]:
        """The arrays, of NumPy from now on."""
        last, of_inputs = self._arrays
        self._arrays = np.asarray(last), None if of_inputs is None else np.asarray(of_inputs)
        return self._arrays


class Gathered:
    """The launches whose states are on the device and that may be looked at some day."""

    def __init__(self, max_bytes: int = MAX_DEVICE_BYTES):
        self._max_bytes = max_bytes
        self._launches: deque[Launch] = deque()
        self._num_bytes = 0

    def add(self, launch: Launch) -> None:
        self._launches.append(launch)
        self._num_bytes += launch.num_bytes
        while self._num_bytes > self._max_bytes:
            oldest = self._launches.popleft()
            self._num_bytes -= oldest.num_bytes
            oldest.to_host()


class Part(NamedTuple):
    """States of the positions from `start` to `end` of one request."""

    start: int
    end: int
    launch: Launch
    index: int  # of its row
    first: int | None  # of its tokens among all that were read; None: one of each step

    def of(self, place: PlaceName, positions: Sequence[int]) -> np.ndarray:
        """`[positions, D]` float32, of positions within."""
        last, of_inputs = self.launch.to_host()
        number = self.launch.places.index(place)
        offsets = [position - self.start for position in positions]
        if self.first is None:
            return last[offsets, number, self.index].astype(np.float32)
        return of_inputs[number, [self.first + each for each in offsets]].astype(np.float32)


@dataclass(kw_only=True)
class StateBooks:
    """One request's."""

    places: tuple[PlaceName, ...]
    positions: tuple[int, ...] | None = None  # None: all
    only_last: bool = False  # of the positions that are read
    parts: list[Part] = field(default_factory=list)
    num_known: int = 0  # positions from 0 on that need not be read again

    def num_reusable(self, num_tokens: int) -> int:
        """Of so many tokens, those at the front whose states nobody asks for (any more)."""
        return num_tokens if self.only_last else self._next(self.num_known, num_tokens)

    def tells_inputs(self, start: int, end: int) -> bool:
        """Whether states are asked for of tokens from `start` to `end` other than the last."""
        last = end - 1
        return not self.only_last and self._next(max(start, self.num_known), last) < last

    def add(self, launch: Launch, index: int, first: int, start: int, end: int, steps: int) -> None:
        """Books what a launch told of a row that read tokens from `start` to `end`, and in further
        steps one more each."""
        if launch.has_inputs and not self.only_last:
            part = Part(start, end, launch, index, first)
        else:
            part = Part(end - 1, end - 1 + steps, launch, index, None)
        if self.only_last:
            self.parts = [part]
        elif part.end > self.num_known:
            self.parts.append(part)
            self.num_known = part.end

    def asked(self, num_read: int) -> list[int]:
        """The positions asked for among the first `num_read`."""
        if self.only_last:
            return [num_read - 1]
        if self.positions is None:
            return list(range(num_read))
        return [position for position in self.positions if position < num_read]

    def array(self, place: PlaceName, num_read: int) -> np.ndarray:
        """Their states, `[positions, D]` float32."""
        left, found = self.asked(num_read), [np.zeros((0, 0), np.float32)]
        for part in self.parts:  # in order; what was read twice is taken once
            if here := [position for position in left if part.start <= position < part.end]:
                found.append(part.of(place, here))
                left = [position for position in left if position >= part.end]
        return np.concatenate(found[1:] or found)

    def _next(self, start: int, end: int) -> int:
        """The first position asked for from `start` on; `end` if there is none before it."""
        if self.positions is None:
            return min(start, end)
        return next((each for each in self.positions if start <= each < end), end)


def merged_states(asked: Iterable[tuple[StateBooks, bool]]) -> WantedStates | None:
    """One choice for a batch: each row's books, and whether it asks of more than its last token."""
    rows = list(asked)
    places = {place for books, _ in rows for place in books.places}
    ordered = sorted(places, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    return WantedStates(tuple(ordered), any(more for _, more in rows)) if rows else None


class HiddenStates(Sequence):
    """States of one finished request, as NumPy arrays of float32, made when they are looked at.

    As a sequence, for the first of the places asked for, it is what SGLang gives: a matrix
    `[prompt tokens, D]`, then a vector `[D]` for each further forward pass; of the positions asked
    for.
    """

    def __init__(self, books: StateBooks, prompt_len: int, num_outputs: int):
        self._books = books
        self._prompt_len = prompt_len
        self._num_passes = max(1, num_outputs)
        self._num_read = prompt_len + self._num_passes - 1
        self._arrays: dict[PlaceName, np.ndarray] = {}

    @property
    def places(self) -> tuple[PlaceName, ...]:
        """The points, and the layers they are of, that `array` has states of."""
        return self._books.places

    @cached_property
    def positions(self) -> np.ndarray:
        """Of the rows of `array`: places in the sequence of prompt and output, from 0."""
        return np.asarray(self._books.asked(self._num_read))

    def array(self, place: PlaceName | None = None) -> np.ndarray:
        """`[positions, D]` of one place, by default the first."""
        place = place or self.places[0]
        if place not in self._arrays:
            self._arrays[place] = self._books.array(place, self._num_read)
        return self._arrays[place]

    def __len__(self) -> int:
        return self._num_passes

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"of {len(self)} forward passes there is none with the number {index}")
        if index % len(self) == 0:
            return self.array()[self.positions < self._prompt_len]
        position = self._prompt_len - 1 + index % len(self)
        if position not in self.positions:
            raise IndexError(f"the state of position {position} was not asked for")
        return self.array()[np.searchsorted(self.positions, position)]

    def __repr__(self) -> str:
        return f"HiddenStates({len(self)} passes, places {self.places})"
