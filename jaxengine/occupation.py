"""What a running engine holds on its device, changed between two steps: other weights, memory given
back and taken again. It knows the loop and the runner, and nothing of names or files.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.loop import Loop
from jaxengine.runner import Runner
from jaxengine.weight_updates import Change, Copies, Part, first_rows, tensors_of

KV_CACHE, WEIGHTS = "kv_cache", "weights"
UPDATE = "weight update"  # a reason to compute nothing

Write = tuple[int, Callable[[jax.Array], jax.Array]]  # a parameter, and what it becomes


class Occupation:
    """Thread-safe; one change at a time. What needs compiling is compiled by the caller's thread,
    and what the steps use is touched by the loop's."""

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        parts: Mapping[str, Part],
        params: Sequence[jax.ShapeDtypeStruct],
        *,
        keeps_backup: bool,
    ):
        self.parts = parts
        self.tensors = frozenset(name for part in parts.values() for name in part.tensors)
        self._loop = loop
        self._runner = runner
        self._params = params
        self._copies = Copies(params)
        self._keeps_backup = keeps_backup
        self._lock = threading.Lock()
        self._backup: list[np.ndarray] | None = None
        self._released: set[str] = set()
        self._undefined: set[str] = set()  # names of tensors whose values are gone
        self._is_open = False  # an update of several calls
        self._has_stale = False  # K and V that it left behind

    def begin(self) -> None:
        """Computes nothing until `end`, so that several updates count as one.

        Raises:
            RuntimeError: that was begun already.
        """
        with self._lock:
            if self._is_open:
                raise RuntimeError("an update has begun already; call end_weight_update() first")
            self._loop.call(lambda: self._loop.halt(UPDATE)).result()
            self._is_open = True

    def end(self) -> int:
        """Computes again; the number of requests that are computed anew.

        Raises:
            RuntimeError: nothing was begun.
        """
        with self._lock:
            if not self._is_open:
                raise RuntimeError("no update has begun; call begin_weight_update() first")

            def run() -> int:
                self._loop.go_on(UPDATE)
                return self._loop.scheduler.start_over() if self._has_stale else 0

            num_restarted = self._loop.call(run).result()
            self._is_open = self._has_stale = False
            return num_restarted

    def update(
        self, changes: Sequence[Change], *, weight_version: str | None, flush_cache: bool
    ) -> int:
        """Puts new values into the parameters; the number of requests that are computed anew.

        Raises:
            RuntimeError: the weights are released.
        """
        with self._lock:
            writes = [(change.part.parameter, self._copies.of(change)) for change in changes]
            tensors = set(tensors_of(changes))

            def run() -> int:
                self._write(writes, tensors)
                if weight_version is not None:
                    self._loop.weight_version = weight_version
                if self._is_open:
                    self._has_stale |= flush_cache
                    return 0
                return self._loop.scheduler.start_over() if flush_cache else 0

            return self._loop.call(run).result()

    def first_rows(self, name: str, count: int) -> np.ndarray:
        """Of a parameter or a checkpoint tensor."""
        with self._lock:
            self._loop.call(self._check_weights).result()
            part = self.parts[name]
            return first_rows(self._runner.params[part.parameter], part, count)

    def release(self, tags: Collection[str]) -> None:
        """Gives memory back. RuntimeError while any request is unfinished."""
        with self._lock:
            self._loop.call(lambda: self._release(tags)).result()

    def resume(self, tags: Collection[str]) -> None:
        """Takes memory again: an empty KV pool; weights of before, or undefined ones."""
        with self._lock:
            buffers = params = None
            if KV_CACHE in self._released.intersection(tags):
                buffers = self._runner.make_buffers()
            if WEIGHTS in self._released.intersection(tags):
                params = self._new_params()
            self._loop.call(lambda: self._resume(buffers, params)).result()

    def _write(self, writes: Sequence[Write], tensors: set[str]) -> None:
        """Until all is written those tensors are neither old nor new."""
        self._check_weights()
        params = list(self._runner.params)
        self._undefined |= tensors
        try:
            for number, write in writes:
                # One after the other: values that come from elsewhere need memory until written.
                params[number] = jax.block_until_ready(write(params[number]))
            self._undefined -= tensors
        except BaseException:
            self._loop.abort(message="an update of the weights failed halfway")
            raise
        finally:
            self._runner.put_params(params)
            self._tell()

    def _check_weights(self) -> None:
        if WEIGHTS in self._released:
            raise RuntimeError(
                "the weights are released; call resume_memory_occupation(['weights']) first"
            )

    def _release(self, tags: Collection[str]) -> None:
        if self._loop.num_live:
            raise RuntimeError(
                f"release_memory_occupation: {self._loop.num_live} requests are unfinished; wait "
                "for them, or abort(abort_all=True)"
            )
        if KV_CACHE in tags:
            self._loop.scheduler.flush_cache()
            self._runner.delete_buffers()
        if WEIGHTS in tags and WEIGHTS not in self._released:
            if self._keeps_backup:
                self._backup = [np.array(param) for param in self._runner.params]
            self._runner.delete_params()
        self._released.update({KV_CACHE, WEIGHTS}.intersection(tags))
        self._tell()

    def _new_params(self) -> list[jax.Array]:
        if self._backup is not None:
            pairs = zip(self._backup, self._params, strict=True)
            return [jax.device_put(host, param.sharding) for host, param in pairs]
        return [jnp.zeros(p.shape, p.dtype, device=p.sharding) for p in self._params]

    def _resume(self, buffers: Any, params: Sequence[jax.Array] | None) -> None:
        if buffers is not None:
            self._runner.put_buffers(buffers)
            self._released.remove(KV_CACHE)
        if params is not None:
            self._runner.put_params(params)
            self._released.remove(WEIGHTS)
            if self._backup is None:
                self._undefined = set(self.tensors)
            self._backup = None
        self._tell()

    def _tell(self) -> None:
        """Has the loop refuse requests while something is missing."""
        self._loop.unready = None
        if self._released:
            self._loop.unready = (
                f"{' and '.join(sorted(self._released))} were released; call "
                "resume_memory_occupation() first"
            )
        elif self._undefined:
            self._loop.unready = (
                f"{len(self._undefined)} tensors of the weights, such as {min(self._undefined)}, "
                "have no values; update them first"
            )
