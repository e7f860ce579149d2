"""Ahead-of-time compilation: which sizes of step exist, building them in parallel, and the count
that proves that nothing is compiled afterwards. It does not know what a step computes.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

logger = logging.getLogger("jaxengine")

MAX_THREADS = 16  # that compile
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Key = TypeVar("Key")


class Bucket(NamedTuple):
    """The static size of a launch: `num_tokens` query tokens in at most `num_rows` rows.

    With `num_steps`, it decodes: each token stands alone, and goes on for so many steps. Where such
    a launch has more tokens than rows, those beyond them come before the last of some row.
    """

    num_tokens: int
    num_rows: int
    num_steps: int = 0

    @property
    def num_packed(self) -> int:
        """Rows of the upload."""
        return self.num_tokens if self.num_steps else self.num_rows


def rungs(ladder: Sequence[int], top: int) -> tuple[int, ...]:
    """The sizes of a ladder below `top`, and `top` itself."""
    return (*(size for size in ladder if size < top), top)


def buckets(
    decode: Mapping[int, Sequence[int]], extend: Sequence[int], max_rows: int
) -> tuple[Bucket, ...]:
    """Every launch size, in the order in which the smallest that fits is sought.

    `decode` are the rows of decoding launches of so many steps, `extend` the tokens of others.
    """
    found = {Bucket(rows, rows, steps) for steps, sizes in decode.items() for rows in sizes}
    found |= {Bucket(tokens, min(tokens, max_rows)) for tokens in extend}
    return tuple(sorted(found))


def thinned(sizes: Collection[Bucket]) -> list[Bucket]:
    """Fewer launch sizes, in the same order: of each kind the largest, one for each power of four
    below it, and the smallest."""
    kept: list[Bucket] = []
    for kind in {size.num_steps for size in sizes}:
        of_kind = sorted((size for size in sizes if size.num_steps == kind), reverse=True)
        limit = of_kind[0].num_tokens
        for size in of_kind:
            if size.num_tokens <= limit or size == of_kind[-1]:
                kept.append(size)
                limit = 4 ** (((size.num_tokens - 1).bit_length() - 1) // 2)  # less than the size
    return sorted(kept)


def waiting(sizes: Iterable[Bucket]) -> dict[Any, Bucket]:
    """Launches of one step -> those of several steps with the same products, to be compiled before
    them: the kernels of both are tried out once, which is half of what compiling takes."""
    several = {size.num_rows: size for size in sizes if size.num_steps > 1}
    singles = (size for size in sizes if size.num_steps == 1)
    return {size: several[size.num_rows] for size in singles if size.num_rows in several}


def compile_all(
    tasks: Mapping[Key, Callable[[], Callable[[], Any]]],
    *,
    shows_progress: bool,
    num_threads: int | None = None,
    beside: Future | None = None,
    after: Mapping[Key, Key] | None = None,
) -> dict[Key, Any]:
    """What the tasks compile, side by side; the first failure is raised, of `beside` too.

    Each task traces a program and returns what compiles it. Tracing is Python and would not gain
    from threads: one is traced after the other while those before it compile. What stands in
    `after` is compiled when the other one is, which has to come first among the tasks: how their
    common kernels are best built is then tried out once.
    """
    started = time.perf_counter()
    num_threads = num_threads or min(os.cpu_count() or 1, MAX_THREADS)
    bar = tqdm(total=len(tasks), desc="compiling", unit="step", disable=not shows_progress)
    others = [] if beside is None else [beside]
    with bar, ThreadPoolExecutor(num_threads, thread_name_prefix="jaxengine-compile") as threads:
        futures: dict[Key, Future] = {}
        try:
            with _no_garbage_collection():
                for key, trace in tasks.items():
                    _raise_failure([*others, *futures.values()])
                    first = futures.get(after[key]) if after and key in after else None
                    futures[key] = threads.submit(_compile_after, first, trace())
                    futures[key].add_done_callback(lambda _: bar.update())
            logger.info("traced %d programs: %.1f s", len(tasks), time.perf_counter() - started)
            for future in as_completed([*others, *futures.values()]):
                future.result()
        except BaseException:  # Ctrl-C too: what has not begun need not be built any more
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: future.result() for key, future in futures.items()}


def _compile_after(first: Future | None, compile_now: Callable[[], Any]) -> Any:
    if first is not None:
        wait([first])
    return compile_now()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects, and hardly any garbage that only a search would find: ten
    megabytes, for a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _raise_failure(futures: Iterable[Future]) -> None:
    for future in futures:
        if future.done():
            future.result()


class CompileCounter:
    """Counts what XLA compiles on one thread after `start` was called on it."""

    def __init__(self):
        self.count = 0
        self._thread: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def start(self) -> None:
        self.count = 0
        self._thread = threading.get_ident()

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT and threading.get_ident() == self._thread:
            self.count += 1

    def close(self) -> None:
        self._thread = None
        jax.monitoring.unregister_event_duration_listener(self._listen)
