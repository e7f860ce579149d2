"""Compiled programs on disk, found again without tracing anything.

JAX's own cache is asked with a lowered program, and lowering is most of a start that finds all of
them there. Here the question is what a program would be lowered from.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxengine.compiling import COMPILE_EVENT
from jaxengine.config import executables_dir
from jaxengine.fingerprint import fingerprint

MAX_BYTES = 4 << 30  # of the folder; the ones that were not used for longest go first

logger = logging.getLogger("jaxengine")


class Compilations(threading.local):
    """How many programs each thread has compiled, and not taken from any cache of JAX's."""

    count = 0

    def listen_for_hits(self, event: str, **kwargs: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.count -= 1  # it ends like a compilation all the same

    def listen_for_ends(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1


compilations = Compilations()
# Once and for good: JAX's lists of listeners must not change while other threads compile.
jax.monitoring.register_event_listener(compilations.listen_for_hits)
jax.monitoring.register_event_duration_secs_listener(compilations.listen_for_ends)


class Executables:
    """Executables of one device, each for the repr of what it was made from.

    As with JAX's cache, whoever can write to the folder can run code as its reader.
    """

    def __init__(self, device: Any, keeps: bool = True):
        self._device = device
        self._fingerprint = fingerprint(device)
        self._folder = executables_dir() if keeps else None

    def through(
        self, key: Any, *, in_tree: Any, out_tree: Any, trace: Callable[[], Callable[[], Any]]
    ) -> Callable[[], Any]:
        """What loads the executable, where there is one, or compiles and keeps it.

        `key` is all that `trace` depends on, beside the code. `trace` is called at once if it is
        needed; the trees are those of `((arguments...), {})` and of the results.
        """
        path = self._path(key)
        if path is None:
            return trace()
        if not path.is_file():
            return self._kept(path, trace())

        def load() -> Any:
            try:
                executable = self._load(path, in_tree, out_tree)
            except Exception as error:  # a damaged file, or one that this device does not take
                logger.warning("%s: cannot be loaded (%s); compiling anew", path, error)
                path.unlink(missing_ok=True)
                return self._kept(path, trace())()
            return executable

        return load

    def _path(self, key: Any) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.sha256(f"{self._fingerprint} {key!r}".encode()).hexdigest()
        return self._folder / f"{name}.bin"

    def _load(self, path: Path, in_tree: Any, out_tree: Any) -> Any:
        data = path.read_bytes()
        os.utime(path)  # it was of use
        return serialize_executable.deserialize_and_load(
            data, in_tree, out_tree, execution_devices=[self._device]
        )

    def _kept(self, path: Path, compile_now: Callable[[], Any]) -> Callable[[], Any]:
        def compile_and_keep() -> Any:
            before = compilations.count
            executable = compile_now()
            if compilations.count == before:  # JAX had it, and written again it may lack parts
                return executable
            try:
                self._write(path, serialize_executable.serialize(executable)[0])
            except Exception as error:  # a full disk, a program that cannot be written out
                logger.warning("%s: an executable was not kept (%s)", path.parent, error)
            return executable

        return compile_and_keep

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all, whoever else writes the same."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(path.parent, len(data))
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _make_room(folder: Path, size: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process makes room as well
        files = sorted(
            (path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir()
        )
        excess = sum(file[1] for file in files) + size - MAX_BYTES
        for _, file_size, path in files:
            if excess <= 0:
                return
            path.unlink()
            excess -= file_size
