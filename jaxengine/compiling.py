"""Ahead-of-time compilation: which sizes of step exist, building them in parallel, and the count
that proves that nothing is compiled afterwards. It does not know what a step computes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Key = TypeVar("Key")


class Bucket(NamedTuple):
    """The static size of a step: `num_tokens` query tokens in at most `num_rows` rows."""

    num_tokens: int
    num_rows: int


def rungs(ladder: Sequence[int], top: int) -> tuple[int, ...]:
    """The sizes of a ladder below `top`, and `top` itself."""
    return (*(size for size in ladder if size < top), top)


def buckets(
    decode: Sequence[int], extend: Sequence[int], rows: Sequence[int]
) -> tuple[Bucket, ...]:
    """Every step size, in the order in which the smallest that fits is sought."""
    found = {Bucket(size, size) for size in decode}
    found |= {Bucket(tokens, min(tokens, limit)) for tokens in extend for limit in rows}
    return tuple(sorted(found))


def compile_all(
    tasks: Mapping[Key, Callable[[], Any]], *, num_threads: int, shows_progress: bool
) -> dict[Key, Any]:
    """The executables of lowerings made by `tasks`, built side by side; the first failure is
    raised."""
    done: dict[Key, Any] = {}
    bar = tqdm(total=len(tasks), desc="compiling", unit="step", disable=not shows_progress)
    with bar, ThreadPoolExecutor(num_threads, thread_name_prefix="jaxengine-compile") as threads:
        futures = {
            threads.submit(lambda make=make: make().compile()): key for key, make in tasks.items()
        }
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                bar.update()
        except BaseException:  # Ctrl-C too: what has not begun need not be built any more
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return done


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
