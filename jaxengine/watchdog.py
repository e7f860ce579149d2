"""Reports a loop that hangs: unfinished requests and no step for too long, by the wall clock."""

import faulthandler
import logging
import sys
import threading
import time

from jaxengine.loop import Loop

logger = logging.getLogger("jaxengine")


class Watchdog:
    """A thread that looks at the loop now and then; says once per hang where every thread is."""

    def __init__(self, loop: Loop, timeout_s: float):
        self._loop = loop
        self._timeout_s = timeout_s
        self._thread = threading.Thread(target=self._watch, name="jaxengine-watchdog", daemon=True)

    def start(self) -> None:
        if self._timeout_s > 0:
            self._thread.start()

    def _watch(self) -> None:
        reported_at = None
        while not self._loop.wait_for_end(self._timeout_s / 4):
            last_step = self._loop.last_step_time
            has_work = self._loop.num_live > 0 and not self._loop.scheduler.is_halted
            is_hung = has_work and time.monotonic() - last_step > self._timeout_s
            if is_hung and reported_at != last_step:
                reported_at = last_step
                logger.error(
                    "no step for %.0f s with %d unfinished requests; all threads' stacks follow",
                    time.monotonic() - last_step,
                    self._loop.num_live,
                )
                faulthandler.dump_traceback(file=sys.stderr)
