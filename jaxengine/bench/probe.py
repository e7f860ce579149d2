"""How busy a run keeps the device, and what a step costs the host: a runner that wraps the engine's
own and looks at the clock. No profiler: that would switch the graphs off.

The device counts as busy while a step is in flight: from when its launch has returned, or the step
before has ended, to its own end. Another thread waits for that, since the engine's asks for tokens
late; it may hear of an end some milliseconds after it, where that one is amid something. The host's
time is all that the engine's thread does but wait for tokens: plan, launch, deliver.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxengine.engine import Engine
from jaxengine.loop import StepRunner


class Usage(NamedTuple):
    num_launches: int
    num_steps: int
    busy_seconds: float  # a step was in flight
    host_seconds: float  # the loop's thread was at work
    first: float  # time of the first call, of the last one; of `clock`
    last: float


class Probe:
    """A `StepRunner` that counts; whatever else is asked of it, the wrapped runner answers.

    `watch` gives the time at which a submitted step ends, once it has.
    """

    def __init__(
        self,
        runner: StepRunner,
        watch: Callable[[Any], Future[float]],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._runner = runner
        self._watch = watch
        self._clock = clock
        self._launches: list[tuple[float, Future[float]]] = []  # when it returned; when it ends
        self._num_steps = 0
        self._waited = 0.0
        self._first: float | None = None
        self._last = 0.0

    def submit(self, plan: Any, *packed: Any) -> Any:
        self._look()
        submitted = self._runner.submit(plan, *packed)
        self._launches.append((self._look(), self._watch(submitted)))
        self._num_steps += max(plan.num_steps, 1)  # a launch may be several steps
        return submitted

    def collect(self, submitted: Any) -> Any:
        asked, waits = self._look(), not _is_done(submitted)
        tokens = self._runner.collect(submitted)
        now = self._look()
        if waits:
            self._waited += now - asked
        return tokens

    def close(self) -> None:
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def usage(self) -> Usage:
        """Waits for the end of what was launched."""
        first = self._last if self._first is None else self._first
        busy, free = 0.0, first  # steps run one after the other
        for launched, end in self._launches:
            busy += max(0.0, end.result() - max(launched, free))
            free = max(free, end.result())
        return Usage(
            num_launches=len(self._launches),
            num_steps=self._num_steps,
            busy_seconds=busy,
            host_seconds=self._last - first - self._waited,
            first=first,
            last=self._last,
        )

    def _look(self) -> float:
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        return self._last


@contextmanager
def probed(engine: Engine) -> Iterator[Probe]:
    """The engine with a probe in its loop; it must be idle at both ends."""
    loop = engine._loop
    runner = loop.runner
    with ThreadPoolExecutor(1) as thread:
        probe = Probe(runner, partial(thread.submit, _end_of))
        loop.call(lambda: setattr(loop, "runner", probe)).result()
        try:
            yield probe
        finally:
            if loop.is_alive:
                loop.call(lambda: setattr(loop, "runner", runner)).result()


def _end_of(submitted: Any) -> float:
    """When all that a step made is there. Array by array: one that is gone ends no other's wait."""
    for leaf in jax.tree.leaves(submitted):
        if isinstance(leaf, jax.Array):
            with suppress(RuntimeError):  # it was taken over by a later step
                leaf.block_until_ready()
    return time.perf_counter()


def _is_done(submitted: Any) -> bool:
    """Whether a step has ended. What it made and what took that over since has ended with it; what
    is no array, as of a runner without a device, is there."""
    arrays = (leaf for leaf in jax.tree.leaves(submitted) if hasattr(leaf, "is_ready"))
    return all(array.is_deleted() or array.is_ready() for array in arrays)
