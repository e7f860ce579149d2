"""Steps that do more than draw tokens: most engines are never asked for one. They are compiled for
the first request that needs them, side by side and before it is queued, while others go on.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from jaxengine.compiling import Bucket, compile_all
from jaxengine.launch import Part, Variant
from jaxengine.request import Request
from jaxengine.step_plan import MAX_UNSENT, Row, states_of, wanted_of
from jaxengine.step_programs import StepPrograms

Key = tuple[Bucket | int, Variant]  # a step by its size, or a draw by its number of rows

logger = logging.getLogger("jaxengine")


class Need(NamedTuple):
    """What a request needs of the steps that read, or of those that decode."""

    variant: Variant
    decodes: bool
    draws: tuple[Part, ...] = ()  # the other parts of a step that pauses

    def is_met_by(self, size: Bucket) -> bool:
        is_long = size.num_steps > 1  # where the host has its say, a launch is one step
        return self.decodes == (size.num_steps > 0) and not (self.draws and is_long)


def needs_of(request: Request) -> Iterator[Need]:
    """Those that are sure to come; with others in its batch there may be more."""
    draws: tuple[Part, ...] = ()
    if request.pauses:
        draws = ("draw",) if request.processor is None else ("draw", "adjust", "choose")
    length = len(request.prompt_ids)
    goes_on = request.max_new_tokens > 1
    part = "read" if draws else "whole"
    variant = lambda row: Variant(part, wanted_of([row]), states_of([row]))
    found = [Need(variant(Row(request, 0, 0, length, 0, 1)), False, draws)]
    if goes_on or length == 1:
        decoding = variant(Row(request, 0, length - 1, 1, 0, 1))
        found.append(Need(decoding, True, draws))
        if goes_on:  # while others read, it decodes in their steps
            found.append(Need(decoding, False, draws))
    return (need for need in found if need.variant != Variant())


class Variants:
    """All of one engine, by size; of fewer sizes than plain steps have, but for those that bring
    tokens along. Thread-safe."""

    def __init__(
        self,
        programs: StepPrograms,
        sizes: Sequence[Bucket],
        num_pages: int,
        *,
        shows_progress: bool = False,
    ):
        self._sizes = sizes
        self._roomy_sizes = sorted([*sizes, *filter(None, map(_with_room, sizes))])
        self._programs = programs
        self._num_pages = num_pages
        self._shows_progress = shows_progress
        self._compiled: dict[Key, Any] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="jaxengine-variants")

    def sizes(self, variant: Variant) -> Sequence[Bucket]:
        """In the order in which the smallest that fits is sought."""
        return self._roomy_sizes if variant.part == "read" else self._sizes

    def get(self, size: Bucket | int, variant: Variant) -> Any:
        """An executable; compiled now where nobody foresaw it, as in a batch of several wishes."""
        key = size, variant
        if key not in self._compiled:
            logger.info("compiling %s on %s", key, threading.current_thread().name)
            self._compiled[key] = self._trace(key)()
        return self._compiled[key]

    def prepare(self, requests: Iterable[Request]) -> Future | None:
        """Compiles what such requests need; None where all of it is there."""
        asking = (request for request in requests if request.asks_more)
        needs = {need for request in asking for need in needs_of(request)}
        keys = {key for need in needs for key in self._keys(need)}
        missing = {key for key in keys if key not in self._compiled}
        return self._worker.submit(self._compile, missing) if missing else None

    def close(self) -> None:
        """Compiles nothing any more, without waiting for what is on its way."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._compiled.clear()

    def _compile(self, keys: set[Key]) -> None:
        tasks = {key: partial(self._trace, key) for key in keys if key not in self._compiled}
        if tasks:  # another call may have asked for the same
            self._compiled.update(compile_all(tasks, shows_progress=self._shows_progress))

    def _trace(self, key: Key) -> Callable[[], Any]:
        size, variant = key
        if isinstance(size, Bucket):
            return self._programs.trace_step(size, self._num_pages, variant)
        return self._programs.trace_draw(size, variant)

    def _keys(self, need: Need) -> Iterator[Key]:
        for size in self.sizes(need.variant):
            if need.is_met_by(size):
                yield size, need.variant
                yield from ((size.num_rows, need.variant.second(part)) for part in need.draws)


def _with_room(size: Bucket) -> Bucket | None:
    """A decoding step for as many rows, of which some read several tokens."""
    room = max(MAX_UNSENT, size.num_rows // 2)
    return size._replace(num_tokens=size.num_rows + room) if size.num_steps == 1 else None
