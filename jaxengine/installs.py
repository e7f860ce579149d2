"""Newly admitted requests as inputs of the programs that install them. Host only: NumPy."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxengine.request import Request
from jaxengine.request_state import InstallInputs

Part = tuple[Request, int, Sequence[int]]  # a request and its tokens from a position on


class InstallSize(NamedTuple):
    """Of a program; what is not filled of its inputs travels too."""

    num_rows: int  # requests
    num_tokens: int  # of their histories, together


INSTALL_SIZES = InstallSize(8, 8192), InstallSize(64, 32768)


def installs(
    requests: Sequence[Request],
    empties: Sequence[InstallInputs],
    pack: Callable[[Request], np.ndarray],
) -> Iterator[InstallInputs]:
    """The inputs of as many calls as it takes: several requests in one, a long history in several.

    `empties` install nothing; the smallest that has room is copied, and the last has most. `pack`
    gives a request's settings.
    """
    max_rows, room = len(empties[-1].slots), len(empties[-1].tokens)
    rows: list[Part] = []
    left = room
    for request in requests:
        tokens = request.token_ids
        for start in range(0, len(tokens), room):
            part = tokens[start : start + room]
            if len(rows) == max_rows or len(part) > left:
                yield _filled(empties, rows, pack)
                rows, left = [], room
            rows.append((request, start, part))
            left -= len(part)
    if rows:
        yield _filled(empties, rows, pack)


def _filled(
    empties: Sequence[InstallInputs],
    rows: Sequence[Part],
    pack: Callable[[Request], np.ndarray],
) -> InstallInputs:
    num_tokens = sum(len(tokens) for _, _, tokens in rows)
    empty = next(
        empty
        for empty in empties
        if len(rows) <= len(empty.slots) and num_tokens <= len(empty.tokens)
    )
    new = InstallInputs(*(field.copy() for field in empty))
    end = 0
    for index, (request, start, tokens) in enumerate(rows):
        new.slots[index], new.starts[index] = request.slot, start
        new.num_tokens[index] = len(tokens)
        new.settings[index] = pack(request)
        new.page_table[index, : len(request.pages)] = request.pages
        new.tokens[end : end + len(tokens)] = tokens
        end += len(tokens)
    return new
