"""Traces of an engine's steps by JAX's profiler, and the names that launches have in any trace. It
knows steps by their number and size only."""

import itertools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax

from jaxengine.step_plan import StepPlan

Annotation = jax.profiler.StepTraceAnnotation


def launch_annotations() -> Callable[[StepPlan], Annotation]:
    """A function that names a launch, `decode` or `extend`, with its number, rows, tokens that are
    read at once, and steps. Where nothing is traced it costs about a microsecond."""
    numbers = itertools.count()

    def annotation(plan: StepPlan) -> Annotation:
        return Annotation(
            "decode" if plan.num_steps else "extend",
            step_num=next(numbers),
            rows=len(plan.rows),
            tokens=plan.num_tokens,
            steps=max(plan.num_steps, 1),
        )

    return annotation


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What is traced, from which step on, and how long."""

    folder: Path
    first_step: int = 0  # counted from the engine's start
    num_steps: int | None = None  # None: until it is stopped
    has_host: bool = True  # what runs on the host besides the names of launches
    has_python: bool = False  # every Python call

    def for_jax(self) -> jax.profiler.ProfileOptions:
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = 2 if self.has_host else 1
        options.python_tracer_level = int(self.has_python)
        return options


def trace_options(
    output_dir: str | None,
    start_step: int | None,
    num_steps: int | None,
    activities: Sequence[str] | None,
    with_stack: bool | None,
) -> TraceOptions:
    """The arguments of `Engine.start_profile`, checked. Raises: ValueError for a wrong one."""
    for name, value in (("start_step", start_step), ("num_steps", num_steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: expected a whole number above 0, or None, got {value!r}")
    kinds = ("CPU", "GPU") if activities is None else tuple(activities)
    if not kinds or not set(kinds) <= {"CPU", "GPU"}:
        raise ValueError(
            f"activities: expected CPU, GPU or both, got {activities!r}; for memory take "
            "jax.profiler.save_device_memory_profile"
        )
    if "GPU" not in kinds:
        warnings.warn("activities: a GPU is traced in any case", stacklevel=3)
    return TraceOptions(
        folder=Path(output_dir or tempfile.mkdtemp(prefix="jaxengine-profile-")).absolute(),
        first_step=start_step or 0,
        num_steps=num_steps,
        has_host="CPU" in kinds,
        has_python=bool(with_stack),
    )


class Steps(Protocol):
    """The loop, as far as a trace needs it."""

    num_steps: int
    after_step: list[Callable[[], None]]


class Trace:
    """Waits for its first step, runs, and ends by itself or when it is told to."""

    def __init__(self, steps: Steps, options: TraceOptions):
        self.options = options
        self.file: Path | None = None  # for Perfetto, once it has ended
        self.error: Exception | None = None  # what went wrong between steps
        self.has_ended = False
        self._steps = steps
        self._has_begun = False
        self._last_step: int | None = None
        if options.first_step <= steps.num_steps:
            self._begin()
        steps.after_step.append(self._look)

    def end(self) -> None:
        """Writes what was traced, which takes up to seconds."""
        if self.has_ended:
            return
        self.has_ended = True
        self._steps.after_step.remove(self._look)
        if self._has_begun:
            jax.profiler.stop_trace()
            files = self.options.folder.glob("plugins/profile/*/perfetto_trace.json.gz")
            self.file = max(files, key=lambda file: file.stat().st_mtime)

    def _begin(self) -> None:
        options = self.options
        try:
            jax.profiler.start_trace(
                options.folder, create_perfetto_trace=True, profiler_options=options.for_jax()
            )
        except RuntimeError as error:  # another engine's, or the caller's own
            raise ValueError(f"start_profile: this process is traced already: {error}") from error
        self._has_begun = True
        if options.num_steps is not None:
            self._last_step = self._steps.num_steps + options.num_steps

    def _look(self) -> None:
        """Called after each launch. The loop outlives what goes wrong here; `stop` tells of it."""
        step = self._steps.num_steps
        if self.error is not None:
            return
        try:
            if not self._has_begun and step >= self.options.first_step:
                self._begin()
            elif self._last_step is not None and step >= self._last_step:
                self.end()
        except Exception as error:
            self.error = error


class Profiler:
    """One trace at a time. To be used on the loop's thread."""

    def __init__(self):
        self._trace: Trace | None = None

    def start(self, steps: Steps, options: TraceOptions) -> None:
        """Raises: ValueError where something is traced already, by this engine or another."""
        if self._trace is not None and not self._trace.has_ended:
            raise ValueError(
                f"start_profile: a trace into {self._trace.options.folder} is under way; "
                "stop_profile() ends it"
            )
        self._trace = Trace(steps, options)

    def stop(self) -> Path:
        """Ends the trace, unless it has ended by itself, and returns its file for Perfetto.

        Raises:
            ValueError: nothing was traced.
        """
        if self._trace is None:
            raise ValueError("stop_profile: nothing is traced; start_profile() begins")
        trace, self._trace = self._trace, None
        trace.end()
        if trace.error is not None:
            raise trace.error
        if trace.file is None:
            raise ValueError(
                f"stop_profile: nothing was traced; start_step = {trace.options.first_step} was "
                "not reached"
            )
        return trace.file

    def close(self) -> None:
        """Ends the trace with the engine."""
        if self._trace is not None:
            self._trace.end()
