"""How finished and half-finished requests reach whoever waits: a channel per call, results and
streams.

The loop's thread puts the index of a request that has something new into the call's channel; the
caller's side reads the request and makes text of it. So slow consumers see the newest state, and
detokenisation costs the loop nothing.
"""

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from jaxengine.loop import Loop
from jaxengine.request import Progress, Request
from jaxengine.results import EmbeddingWriter, Writer

ENGINE_FAILED = 500  # status code of requests that the engine itself let down


class Call:
    """The requests of one call, and the writers of their results."""

    def __init__(
        self,
        requests: list[Request],
        writers: Sequence[Writer | EmbeddingWriter],
        loop: Loop,
        *,
        is_batch: bool,
        owner: object = None,  # the engine: it must live while somebody waits
    ):
        self.requests = requests
        self._writers = writers
        self._loop = loop
        self._is_batch = is_batch
        self._owner = owner
        self._unfinished = set(range(len(requests)))
        self._written: dict[int, Progress] = {}

    def report_to(self, put: Callable[[int], None]) -> None:
        for index, request in enumerate(self.requests):
            request.report = lambda index=index: put(index)

    def start(self) -> Future:
        return self._loop.add(self.requests)

    def abandon(self) -> None:
        """Aborts what nobody waits for any more."""
        if self._unfinished and self._loop.is_alive:  # at the exit little but flags may be used
            self._loop.abandon([self.requests[index] for index in self._unfinished])
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
        if progress.finish_reason is not None:
            self._unfinished.discard(index)
        return result

    def chunk(self, index: int) -> dict[str, Any] | None:
        """`result` as a stream gives it."""
        result = self.result(index)
        if result is not None and self._is_batch:
            result["index"] = index
        return result

    def collected(self, results: dict[int, dict[str, Any]]) -> Any:
        """What a call that does not stream returns."""
        self.raise_failure()
        ordered = [results[index] for index in range(len(self.requests))]
        return ordered if self._is_batch else ordered[0]

    def raise_failure(self) -> None:
        """Raises RuntimeError if the engine failed under any of the requests."""
        for request in self.requests:
            reason = request.finish_reason or {}
            if reason.get("status_code") == ENGINE_FAILED:
                raise RuntimeError(reason["message"]) from self._loop.error


def wait(call: Call) -> Any:
    """Runs a call to its end on the calling thread; an exception there (Ctrl-C) aborts it."""
    channel: queue.SimpleQueue[int] = queue.SimpleQueue()
    call.report_to(channel.put)
    results: dict[int, dict[str, Any]] = {}
    try:
        call.start().result()
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
        await asyncio.wrap_future(call.start())
        while not call.is_done:
            index = await channel.get()
            results[index] = call.result(index) or results[index]
        return call.collected(results)
    finally:
        call.abandon()


class Stream(Iterator[dict[str, Any]]):
    """Chunks of a call that is already running. Closing or dropping it aborts the rest.

    Where the engine fails, RuntimeError follows the last chunks.
    """

    def __init__(self, call: Call):
        self._call = call
        self._channel: queue.SimpleQueue[int] = queue.SimpleQueue()
        call.report_to(self._channel.put)
        call.start().result()

    def __next__(self) -> dict[str, Any]:
        while not self._call.is_done:
            try:
                chunk = self._call.chunk(self._channel.get())
            except BaseException:
                self.close()
                raise
            if chunk is not None:
                return chunk
        self._call.raise_failure()
        raise StopIteration

    def close(self) -> None:
        self._call.abandon()

    def __del__(self) -> None:
        self.close()


class AsyncStream(AsyncIterator[dict[str, Any]]):
    """`Stream` for coroutines; it belongs to the event loop it was started on."""

    def __init__(self, call: Call):
        self._call = call
        self._channel = _async_channel(call)

    async def start(self) -> "AsyncStream":
        await asyncio.wrap_future(self._call.start())
        return self

    async def __anext__(self) -> dict[str, Any]:
        while not self._call.is_done:
            try:
                chunk = self._call.chunk(await self._channel.get())
            except BaseException:
                self.close()
                raise
            if chunk is not None:
                return chunk
        self._call.raise_failure()
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
