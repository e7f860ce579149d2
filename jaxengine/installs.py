"""Newly admitted requests as inputs of the program that installs them. Host only: NumPy."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxengine.request import Request
from jaxengine.request_state import InstallInputs

Part = tuple[Request, int, list[int]]  # a request and its tokens from a position on


def installs(
    requests: Sequence[Request], empty: InstallInputs, pack: Callable[[Request], np.ndarray]
) -> Iterator[InstallInputs]:
    """The inputs of as many calls as it takes: several requests in one, a long history in several.

    `empty` installs nothing and is copied; `pack` gives a request's settings.
    """
    max_rows, room = len(empty.slots), len(empty.tokens)
    rows: list[Part] = []
    left = room
    for request in requests:
        tokens = request.token_ids
        for start in range(0, len(tokens), room):
            part = tokens[start : start + room]
            if len(rows) == max_rows or len(part) > left:
                yield _filled(empty, rows, pack)
                rows, left = [], room
            rows.append((request, start, part))
            left -= len(part)
    if rows:
        yield _filled(empty, rows, pack)


def _filled(
    empty: InstallInputs, rows: Sequence[Part], pack: Callable[[Request], np.ndarray]
) -> InstallInputs:
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
