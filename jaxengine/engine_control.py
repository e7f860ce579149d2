"""The methods of an engine that ask or tell it something besides generating, and what programs
written for SGLang reach into it for."""

import asyncio
import gc
import weakref
from functools import cached_property, partial
from typing import Any

from jaxengine.engine_weights import unavailable
from jaxengine.loop import Loop
from jaxengine.server_info import model_info, scheduler_info, server_info
from jaxengine.startup import Started
from jaxengine.tokenizer_manager import TokenizerManager

PAUSES = ("abort", "in_place", "retract")
PAUSE = "pause_generation"  # a reason to compute nothing
REMOTE_METHODS = ("check_integrity", "flush_cache")  # of the scheduler, for `collective_rpc`

NO_EXPERTS = "the models that are supported have no experts, so there is nothing to record"


class ControlMethods:
    """Of a class that has `_loop` and `_started`."""

    _loop: Loop
    _started: Started

    # What it tells

    def get_server_info(self) -> dict[str, Any]:
        """The resolved arguments, sizes, timings of the start and counters of the run."""
        return server_info(self._started)

    def get_model_info(self) -> dict[str, Any]:
        """Which model this is, and what it can do."""
        return model_info(self._started)

    @property
    def scheduler_info(self) -> dict[str, Any]:
        """Part of `get_server_info`: whether it is ready, and how much fits."""
        return scheduler_info(self._started)

    def get_all_child_pids(self) -> list[int]:
        """None: the engine is a thread of this process."""
        return []

    # What it does

    def pause_generation(self, mode: str = "abort") -> None:
        """Begins no more steps until `continue_generation`. Calls are taken, and wait.

        Args:
            mode: `abort` ends what is unfinished; `in_place` goes on with it later, with the keys
                and values that are there; `retract` too, with all of them computed anew.

        Raises:
            ValueError: another mode.
        """
        if mode not in PAUSES:
            raise ValueError(f"mode: expected {' or '.join(PAUSES)}, got {mode!r}")
        self._loop.call(lambda: self._loop.halt(PAUSE)).result()
        if mode == "abort":
            self._loop.abort(None, "generation was paused").result()
        if mode == "retract":
            self._loop.call(self._loop.scheduler.start_over).result()

    def continue_generation(self) -> None:
        """Ends a pause; without one it does nothing."""
        self._loop.call(lambda: self._loop.go_on(PAUSE)).result()

    def collective_rpc(self, method: str, **kwargs: Any) -> Any:
        """Calls a method of the scheduler between two steps: `flush_cache`, which returns whether
        it did, or `check_integrity`, which raises RuntimeError where the books are wrong.

        Raises:
            ValueError: another method.
        """
        if method not in REMOTE_METHODS:
            raise ValueError(
                f"collective_rpc: expected {' or '.join(REMOTE_METHODS)}, got {method!r}; what "
                "else there is are methods of the engine"
            )
        return self._loop.call(partial(getattr(self._loop.scheduler, method), **kwargs)).result()

    def freeze_gc(self) -> None:
        """Takes all objects that exist now out of Python's garbage collection, for shorter pauses
        of the whole process. Afterwards an engine has to be shut down: a forgotten one may stay."""
        gc.collect()
        gc.freeze()

    # What there is no need of

    start_expert_distribution_record = stop_expert_distribution_record = unavailable(NO_EXPERTS)
    dump_expert_distribution_record = unavailable(NO_EXPERTS)
    save_sharded_model = save_remote_model = unavailable(
        "one engine holds a whole model; copy the folder of its safetensors files, or save the "
        "model that update_weights() was given"
    )
    attach_tokenizer_worker = unavailable("there are none; any number of threads may call generate")

    # What programs written for SGLang reach for

    @property
    def tokenizer_manager(self) -> TokenizerManager:
        """See there."""
        return TokenizerManager(self)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """An event loop for `engine.loop.run_until_complete(...)`: the one that runs, or else one
        of the engine's own. The engine itself needs none."""
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            return self._event_loop

    @cached_property
    def _event_loop(self) -> asyncio.AbstractEventLoop:
        event_loop = asyncio.new_event_loop()
        weakref.finalize(self, event_loop.close)
        return event_loop
