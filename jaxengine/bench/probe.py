"""How busy a run keeps the device, and what a step costs the host: a runner that wraps the engine's
own and looks at the clock. No profiler: that would switch the graphs off.

The device counts as busy while a step is known to be in flight: from when its launch has returned
to when its tokens are there. The end of a step is known exactly where the loop waits for it. Else
the step is asked whether it is done, at each call; the time between the last "no" and the first
"yes" counts as idle, so the share is a lower bound. The host's time is all that the loop's thread
does but wait for tokens: plan, launch, deliver.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """A `StepRunner` that counts; whatever else is asked of it, the wrapped runner answers."""

    def __init__(self, runner: StepRunner, clock: Callable[[], float] = time.perf_counter):
        self._runner = runner
        self._clock = clock
        self._newest: Any = None  # the last step launched; None once it is seen done
        self._seen = 0.0  # when it was last seen in flight
        self._num_launches = self._num_steps = 0
        self._busy = self._waited = 0.0
        self._first: float | None = None
        self._last = 0.0

    def submit(self, plan: Any, *packed: Any) -> Any:
        self._look()
        submitted = self._runner.submit(plan, *packed)
        self._look()
        self._newest, self._seen = submitted, self._last
        self._num_launches += 1
        self._num_steps += max(plan.num_steps, 1)  # a launch may be several steps
        return submitted

    def collect(self, submitted: Any) -> Any:
        self._look()
        waits, asked = not _is_done(submitted), self._last
        tokens = self._runner.collect(submitted)
        now = self._clock()
        if waits:
            self._waited += now - asked
            # The steps run one after the other: until now this one was in flight.
            self._busy += now - self._seen
            self._seen = now
        self._look()
        return tokens

    def close(self) -> None:
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def usage(self) -> Usage:
        first = self._last if self._first is None else self._first
        host = self._last - first - self._waited
        return Usage(
            num_launches=self._num_launches,
            num_steps=self._num_steps,
            busy_seconds=self._busy,
            host_seconds=host,
            first=first,
            last=self._last,
        )

    def _look(self) -> None:
        """Counts the time since the last look if the newest step is still in flight."""
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        if self._newest is None:
            return
        if _is_done(self._newest):
            self._newest = None
        else:
            self._busy += self._last - self._seen
            self._seen = self._last


@contextmanager
def probed(engine: Engine) -> Iterator[Probe]:
    """The engine with a probe in its loop; it must be idle at both ends."""
    loop = engine._loop
    runner = loop.runner
    probe = Probe(runner)
    loop.call(lambda: setattr(loop, "runner", probe)).result()
    try:
        yield probe
    finally:
        if loop.is_alive:
            loop.call(lambda: setattr(loop, "runner", runner)).result()


def _is_done(submitted: Any) -> bool:
    """Whether a step has ended. What it made and what took that over since has ended with it; what
    is no array, as of a runner without a device, is there."""
    arrays = (leaf for leaf in jax.tree.leaves(submitted) if hasattr(leaf, "is_ready"))
    return all(array.is_deleted() or array.is_ready() for array in arrays)
