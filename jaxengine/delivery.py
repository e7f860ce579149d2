"""How finished and half-finished requests reach whoever waits: a channel per call, results and
streams.

The loop's thread puts the index of a request that has something new into the call's channel; the
caller's side reads the request and makes text of it. So slow consumers see the newest state, and
detokenisation costs the loop nothing.
"""

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from jaxengine.request import Progress, Request
from jaxengine.results import Writer

ENGINE_FAILED = 500  # status code of requests that the engine itself let down


class Call:
    """The requests of one call, and the writers of their results."""

    def __init__(
        self,
        requests: list[Request],
        writers: list[Writer],
        *,
        is_batch: bool,
        start: Callable[["Call"], Any],
        abort: Callable[[list[str]], Any],
    ):
        self.requests = requests
        self.is_batch = is_batch
        self._writers = writers
        self._start = start
        self._abort = abort
        self._unfinished = set(range(len(requests)))
        self._written: dict[int, Progress] = {}

    def report_to(self, put: Callable[[int], None]) -> None:
        for index, request in enumerate(self.requests):
            request.report = lambda index=index: put(index)

    def start(self) -> None:
        self._start(self)

    def abandon(self) -> None:
        """Aborts what nobody waits for any more."""
        if self._unfinished:
            self._abort([self.requests[index].rid for index in self._unfinished])
            self._unfinished.clear()

    @property
    def is_done(self) -> bool:
        return not self._unfinished

    def result(self, index: int) -> dict[str, Any] | None:
        """The state of a request as a dictionary; None where the last one given was this very
        state."""
        progress = self.requests[index].progress
        if index not in self._unfinished or progress is self._written.get(index):
            return None
        self._written[index] = progress
        result = self._writers[index].write(progress)
        if result["meta_info"]["finish_reason"] is not None:
            self._unfinished.discard(index)
        return result

    def collected(self, results: dict[int, dict[str, Any]]) -> Any:
        """What a call that does not stream returns."""
        ordered = [results[index] for index in range(len(self.requests))]
        for result in ordered:
            reason = result["meta_info"]["finish_reason"]
            if reason["type"] == "abort" and reason.get("status_code") == ENGINE_FAILED:
                raise RuntimeError(reason["message"])
        return ordered if self.is_batch else ordered[0]

    def chunk(self, index: int) -> dict[str, Any] | None:
        result = self.result(index)
        if result is not None and self.is_batch:
            result["index"] = index
        return result


def wait(call: Call) -> Any:
    """Runs a call to its end on the calling thread; an exception there (Ctrl-C) aborts it."""
    channel: queue.SimpleQueue[int] = queue.SimpleQueue()
    call.report_to(channel.put)
    results: dict[int, dict[str, Any]] = {}
    try:
        call.start()
        while not call.is_done:
            index = channel.get()
            results[index] = call.result(index) or results[index]
        return call.collected(results)
    finally:
        call.abandon()


async def wait_async(call: Call) -> Any:
    """`wait` for a coroutine on any event loop; cancelling it aborts the call."""
    channel = _async_channel(call)
    results: dict[int, dict[str, Any]] = {}
    try:
        call.start()
        while not call.is_done:
            index = await channel.get()
            results[index] = call.result(index) or results[index]
        return call.collected(results)
    finally:
        call.abandon()


class Stream(Iterator[dict[str, Any]]):
    """Chunks of a call that is already running. Closing or dropping it aborts the rest."""

    def __init__(self, call: Call):
        self._call = call
        self._channel: queue.SimpleQueue[int] = queue.SimpleQueue()
        call.report_to(self._channel.put)
        call.start()

    def __next__(self) -> dict[str, Any]:
        while not self._call.is_done:
            try:
                chunk = self._call.chunk(self._channel.get())
            except BaseException:
                self.close()
                raise
            if chunk is not None:
                return chunk
        raise StopIteration

    def close(self) -> None:
        self._call.abandon()

    def __del__(self) -> None:
        self.close()


class AsyncStream(AsyncIterator[dict[str, Any]]):
    """`Stream` for coroutines; it belongs to the event loop it was made on."""

    def __init__(self, call: Call):
        self._call = call
        self._channel = _async_channel(call)
        call.start()

    async def __anext__(self) -> dict[str, Any]:
        while not self._call.is_done:
            try:
                chunk = self._call.chunk(await self._channel.get())
            except BaseException:
                self.close()
                raise
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    def close(self) -> None:
        self._call.abandon()

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _async_channel(call: Call) -> asyncio.Queue[int]:
    event_loop = asyncio.get_running_loop()
    channel: asyncio.Queue[int] = asyncio.Queue()

    def put(index: int) -> None:
        with contextlib.suppress(RuntimeError):  # that event loop was closed: nobody waits any more
            event_loop.call_soon_threadsafe(channel.put_nowait, index)

    call.report_to(put)
    return channel
