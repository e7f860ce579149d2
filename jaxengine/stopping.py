"""Where a growing text stops: stop strings and stop expressions. It knows text only, no tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import regex

REGEX_WINDOW = 512
"""A stop expression sees the new text and this many characters before it."""

REGEX_SECONDS = 0.2
"""What one search may take. An expression can take exponentially long on a short text, and all
requests would wait for it."""


class Stop(NamedTuple):
    """A stop that occurred: the stop string or the *pattern*, and how much of the text remains."""

    matched: str
    text_len: int


class StopMatcher:
    """Watches one request's text. Searches only what is new, so the total time is linear."""

    def __init__(
        self,
        stop: Sequence[str] = (),
        stop_regex: Sequence[str] = (),
        *,
        no_stop_trim: bool = False,
    ):
        if "" in stop:
            raise ValueError("stop: expected non-empty strings, got an empty one; leave it out")
        self._strings = tuple(stop)
        self._patterns = tuple(map(_compiled, stop_regex))
        self._no_stop_trim = no_stop_trim
        self._num_searched = 0

    def search(self, text: str) -> Stop | None:
        """The stop in `text`, which begins with the text of the last call; None if there is none.

        Strings come before expressions; of several strings the one that is complete first. The text
        is cut before the string (after it with `no_stop_trim`), and not at all by an expression.
        Raises ValueError for an expression that takes too long.
        """
        start, self._num_searched = self._num_searched, len(text)
        if len(text) == start:
            return None
        return self._search_strings(text, start) or self._search_patterns(text, start)

    def shown_len(self, text: str) -> int:
        """How much of `text` may be streamed: not an end that a stop string may begin with."""
        if self._no_stop_trim:
            return len(text)
        return len(text) - max((_overlap(text, string) for string in self._strings), default=0)

    def _search_strings(self, text: str, start: int) -> Stop | None:
        found = []
        for string in self._strings:
            begin = text.find(string, max(0, start - len(string) + 1))
            if begin >= 0:
                found.append((begin + len(string), begin, string))
        if not found:
            return None
        end, begin, string = min(found)
        return Stop(string, end if self._no_stop_trim else begin)

    def _search_patterns(self, text: str, start: int) -> Stop | None:
        for pattern in self._patterns:
            try:
                found = pattern.search(text, max(0, start - REGEX_WINDOW), timeout=REGEX_SECONDS)
            except TimeoutError as error:
                raise ValueError(
                    f"stop_regex: {pattern.pattern!r} took more than {REGEX_SECONDS} s on the last "
                    f"{len(text) - start + REGEX_WINDOW} characters; avoid nested repetition"
                ) from error
            if found:
                return Stop(pattern.pattern, len(text))
        return None


def _compiled(pattern: str) -> regex.Pattern:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"stop_regex: {pattern!r} is not an expression ({error})") from error


def _overlap(text: str, string: str) -> int:
    """Length of the longest proper beginning of `string` that `text` ends with."""
    lengths = range(min(len(string) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
