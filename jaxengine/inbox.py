"""Calls that other threads leave for the engine's, which answers them between two steps."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Inbox:
    """Thread-safe; one thread answers."""

    def __init__(self):
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()

    def put(self, function: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._calls.put((function, future))
        return future

    def answer(self, can_wait: bool) -> bool:
        """Answers the first call, waiting for it if need be; False where there is none."""
        try:
            function, future = self._calls.get(block=can_wait)
        except queue.Empty:
            return False
        if future.set_running_or_notify_cancel():  # else whoever called was cancelled meanwhile
            try:
                future.set_result(function())
            except Exception as error:  # the caller's error, raised where it waits
                future.set_exception(error)
        return True

    def refuse(self, refusal: Callable[[], Exception]) -> None:
        """Answers all calls with an error each."""
        while True:
            try:
                _, future = self._calls.get_nowait()
            except queue.Empty:
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(refusal())
