"""The methods of an engine that trace its steps. What a trace is stands in `profiling`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxengine.loop import Loop
from jaxengine.profiling import trace_options
from jaxengine.startup import Started

BY_STAGE = "one trace has all launches, named decode and extend; look for them there"

REFUSED = {
    "profile_by_stage": BY_STAGE,
    "profile_stages": BY_STAGE,
    "profile_prefix": "JAX names the files by time and host; give a folder as output_dir",
}
"""SGLang's other arguments of `start_profile`, and what to do instead."""


class ProfilingMethods:
    """Of a class that has `_loop` and `_started`."""

    _loop: Loop
    _started: Started

    def start_profile(
        self,
        output_dir: str | None = None,
        start_step: int | None = None,
        num_steps: int | None = None,
        activities: Sequence[str] | None = None,
        with_stack: bool | None = None,
        record_shapes: bool | None = None,
        merge_profiles: bool = False,
        **refused: Any,
    ) -> str:
        """Begins a trace of what host and device do, one per process at a time.

        It lands in `output_dir/plugins/profile/TIME/` when it ends: `perfetto_trace.json.gz` for
        https://ui.perfetto.dev, and `HOST.xplane.pb` for XProf. A launch is called `decode` or
        `extend` there, with its number, rows, tokens and steps. The engine waits while the files
        are written, which takes seconds for a hundred launches: a short trace is a good one. On a
        GPU a traced step is no CUDA graph, so times between its kernels are longer than without.

        Args:
            output_dir: by default a new temporary folder.
            start_step: begin at this step, counted from the engine's start as `num_steps` in
                `get_server_info()`; by default at once.
            num_steps: end by itself after so many steps, or a few more where one launch has
                several; by default `stop_profile` or `shutdown` ends it.
            activities: of "CPU" and "GPU"; without "CPU" the host has the names of launches only.
            with_stack: every Python call too, which slows the host down.
            record_shapes, merge_profiles: accepted; XProf shows the shapes of all operations, and
                there is one process.

        Returns:
            The folder.

        Raises:
            ValueError: something is traced already, or an argument that cannot be had.
            TypeError: a name that does not exist.
        """
        for name, value in refused.items():
            if name not in REFUSED:
                raise TypeError(f"start_profile() got an unexpected argument {name!r}")
            if value:
                raise ValueError(f"{name}: expected nothing, got {value!r}; {REFUSED[name]}")
        options = trace_options(output_dir, start_step, num_steps, activities, with_stack)
        self._loop.call(partial(self._started.profiler.start, self._loop, options)).result()
        return str(options.folder)

    def stop_profile(self) -> str:
        """Ends the trace, if it has not ended by itself, and returns the file for Perfetto.

        Raises:
            ValueError: nothing was traced.
        """
        return str(self._loop.call(self._started.profiler.stop).result())
