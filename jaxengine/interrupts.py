"""Ctrl-C during a call of the engine, which Python may otherwise report and forget."""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS_UNTIL_AGAIN = 0.01


@contextmanager
def heeds_ctrl_c() -> Iterator[None]:
    """Within it, a Ctrl-C that comes during a garbage collection ends the call soon after it.

    Python raises KeyboardInterrupt in whatever function the main thread comes to next. After a
    collection that is a finalizer or a callback of the collector, as JAX has one, and what these
    raise is printed and ignored. A busy call spends a tenth of its time in collections.

    Does nothing in other threads, or where a program handles SIGINT itself, as asyncio does.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if not _is_ignored_in(frame):
        signal.default_int_handler(signum, frame)
    again = threading.Timer(
        SECONDS_UNTIL_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signum)
    )
    again.daemon = True
    again.start()


def _is_ignored_in(frame: FrameType | None) -> bool:
    """Whether Python would ignore an exception in it, being called by the collector."""
    callbacks = [getattr(each, "__code__", None) for each in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
