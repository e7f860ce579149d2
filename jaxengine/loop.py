"""The engine's thread: schedule, submit, collect, deliver, again and again.

Overlapped, step n+1 is on its way before the tokens of step n are read, so the device never waits
for the host; the plain loop beside it does one thing after the other and gives the same tokens.
Everything that changes the scheduler happens on this thread: others leave their calls in its inbox.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from jaxengine import outputs
from jaxengine.booking import (
    NOT_FINITE,
    NOT_FINITE_REASON,
    append,
    book_logprobs,
    book_states,
    foresee,
    read_reason,
)
from jaxengine.hidden_states import Gathered, Launch, WantedStates
from jaxengine.inbox import Inbox
from jaxengine.logprobs import Told
from jaxengine.pausing import BeginMasks, Pause
from jaxengine.request import Request, Status
from jaxengine.scheduler import Scheduler
from jaxengine.step_plan import Row, StepPlan


class StepRunner(Protocol):
    def pack(self, plan: StepPlan, /) -> Any: ...

    def submit(self, plan: StepPlan, packed: Any, /) -> Any: ...

    def collect(self, submitted: Any, /) -> Sequence[Sequence[int]]: ...

    def collect_logprobs(self, submitted: Any, /) -> tuple[Told | None, Told | None]: ...

    def collect_states(self, submitted: Any, wanted: WantedStates, /) -> Launch: ...

    def collect_embeddings(self, submitted: Any, /) -> Any: ...

    def close(self) -> None: ...


class Loop:
    """Runs requests to their end; thread-safe from `start` to `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        overlaps: bool = True,
        max_queued_requests: int | None = None,
        weight_version: str = "default",
        begin_masks: BeginMasks | None = None,
        on_start: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ):
        self.scheduler = scheduler
        self.runner = runner
        self.error: BaseException | None = None
        self.weight_version = weight_version
        self.unready: str | None = None  # why no request can be computed at present
        self.after_step: list[Callable[[], None]] = []  # called behind each launch's delivery
        self.num_steps = 0
        self.num_output_tokens = 0
        self.last_step_time = time.monotonic()
        self.throughput = 0.0  # output tokens per second, over the last second of steps
        self._overlaps = overlaps
        self._begin_masks = begin_masks
        self._max_queued_requests = max_queued_requests
        self._on_start = on_start
        self._on_end = on_end
        self._states = Gathered()
        self._window = (self.last_step_time, 0)  # start of the present second, tokens by then
        self._live: dict[str, Request] = {}
        self._inbox = Inbox()
        self._is_stopping = self._has_ended = False
        self._thread = threading.Thread(target=self._main, name="jaxengine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # From any thread

    def call(self, function: Callable[[], Any]) -> Future:
        """Runs `function` on the loop's thread between two steps."""
        future = self._inbox.put(function)
        if not self.is_alive:  # nobody else will answer
            self._inbox.refuse(self.refusal)
        return future

    def add(self, requests: Iterable[Request]) -> Future:
        requests = list(requests)
        return self.call(lambda: self._add(requests))

    def abort(
        self, rids: Iterable[str] | None = None, message: str = "aborted by request"
    ) -> Future:
        """Ends the requests of these ids, or all; unknown and finished ids are no error."""
        chosen = None if rids is None else list(rids)
        return self.call(lambda: self._abort(chosen, message))

    def abandon(self, requests: Iterable[Request]) -> Future:
        """Ends these very requests, where they are unfinished: nobody waits for them any more."""
        abandoned = list(requests)
        return self.call(lambda: self._abandon(abandoned))

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread after the step in flight; unfinished requests are aborted. May be called
        twice, and from the thread itself: the garbage collector runs on any."""
        self._is_stopping = True
        self.call(lambda: None)  # wakes it
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def wait_for_end(self, timeout: float) -> bool:
        """Whether the thread has ended, at the latest after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return not self._has_ended and self._thread.is_alive()

    @property
    def num_live(self) -> int:
        return len(self._live)

    # On the loop's thread

    def halt(self, why: str) -> None:
        """Begins no more steps until `go_on` for each reason given; calls are taken, and wait."""
        self.scheduler.halts.add(why)

    def go_on(self, why: str) -> None:
        self.last_step_time = time.monotonic()  # a pause is no hang
        self.scheduler.halts.discard(why)

    def _main(self) -> None:
        try:
            if self._on_start is not None:
                self._on_start()
            self._run_overlapped() if self._overlaps else self._run_plain()
        except BaseException as error:  # the thread's boundary: callers are told, none waits on
            self.error = error
        finally:
            self._end()

    def _run_plain(self) -> None:
        while self._receive(can_wait=self.scheduler.rests):
            plan = self.scheduler.schedule()
            if plan is not None:
                submitted = self.runner.submit(plan, self.runner.pack(plan))
                pause = self._pause(plan, submitted)
                self._deliver(plan, submitted if pause is None else pause.end())

    def _run_overlapped(self) -> None:
        flying: tuple[StepPlan, Any] | None = None
        while self._receive(can_wait=flying is None and self.scheduler.rests):
            pause = None if flying is None else self._pause(*flying)
            plan = self.scheduler.schedule()
            packed = None if plan is None else self.runner.pack(plan)
            if flying is not None and pause is not None:  # and the next one is right behind it
                flying = flying[0], pause.end()
            submitted = None if plan is None else (plan, self.runner.submit(plan, packed))
            if flying is not None:
                self._deliver(*flying)
            flying = submitted

    def _pause(self, plan: StepPlan, submitted: Any) -> Pause | None:
        """The host's say in a step: all tokens before it are known now."""
        if not plan.pauses:
            return None
        return Pause(self.runner, plan, submitted, self._begin_masks, self._fail)

    def _receive(self, can_wait: bool) -> bool:
        """Answers the inbox, waiting for a first call where there is nothing else to do; False at
        the end."""
        while not self._is_stopping:
            if not self._inbox.answer(can_wait):
                return True
            can_wait = can_wait and self.scheduler.rests
        return False

    def _deliver(self, plan: StepPlan, submitted: Any) -> None:
        drawn = self.runner.collect(submitted)
        told = None if plan.wanted is None else self.runner.collect_logprobs(submitted)
        if plan.states is not None:
            self._states.add(launch := self.runner.collect_states(submitted, plan.states))
            book_states(plan, launch)
        embeddings = self.runner.collect_embeddings(submitted)
        first = 0  # the row's first token among those that were read
        for index, (row, tokens) in enumerate(zip(plan.rows, drawn, strict=False)):  # then padding
            if told is not None and row.request.status is not Status.FINISHED:
                book_logprobs(row, index, first, tokens, *told)
            if embeddings is not None:  # it is one where the prompt ends
                row.request.embedding = embeddings[index]
            self._deliver_row(row, tokens[: row.num_draws])
            first += row.query_len
        self._count_steps(max(plan.num_steps, 1))
        for look in tuple(self.after_step):
            look()

    def _count_steps(self, count: int) -> None:
        self.num_steps += count
        self.last_step_time = time.monotonic()
        started, tokens = self._window
        if self.last_step_time - started >= 1:
            spent = self.last_step_time - started
            self.throughput = (self.num_output_tokens - tokens) / spent
            self._window = (self.last_step_time, self.num_output_tokens)

    def _deliver_row(self, row: Row, tokens: Sequence[int]) -> None:
        request = row.request
        if request.status is Status.FINISHED:  # it ended before this step did
            return
        if not tokens:
            if row.start + row.query_len == request.num_to_compute:  # a prompt; nothing to draw
                reason = read_reason(request)
                self._finish(request, reason, keeps_prefix=reason is not NOT_FINITE_REASON)
            return
        if request.skips_forced and row.foreseen is not None:  # it was booked already
            if NOT_FINITE in tokens:
                self._finish(request, NOT_FINITE_REASON, keeps_prefix=False)
            return
        num_before = len(request.output_ids)
        self._report(request, num_before, append(request, tokens))

    def _report(self, request: Request, num_before: int, reason: dict[str, Any] | None) -> None:
        """Of a request that had fewer output tokens before: its end, or that it goes on."""
        num_tokens = len(request.output_ids)
        self.num_output_tokens += num_tokens - num_before
        if reason is not None:
            self._finish(request, reason, keeps_prefix=reason is not NOT_FINITE_REASON)
        elif interval := request.stream_interval:  # a chunk after the first token, and so on
            if (num_tokens - 1) // interval > (num_before - 1) // interval:
                request.publish(self.weight_version)

    def _finish(self, request: Request, reason: dict[str, Any], keeps_prefix: bool = True) -> None:
        self.scheduler.finish(request, reason, keeps_prefix)
        self._report_end(request)

    def _fail(self, request: Request, message: str) -> None:
        """Ends a request, and no other, for what was wrong with it."""
        if request.status is not Status.FINISHED:
            self._finish(request, outputs.bad_request_reason(message))

    def _report_end(self, request: Request) -> None:
        request.finish_time = time.time()
        del self._live[request.rid]
        request.publish(self.weight_version)

    def _add(self, requests: list[Request]) -> None:
        if self.unready is not None:
            raise RuntimeError(self.unready)
        taken = [request.rid for request in requests if request.rid in self._live]
        if taken:
            raise ValueError(f"rid {taken[0]!r} is in use by an unfinished request; choose another")
        limit = self._max_queued_requests
        if limit is not None and self.scheduler.num_waiting + len(requests) > limit:
            raise ValueError(
                f"{self.scheduler.num_waiting} requests wait and {len(requests)} more would exceed "
                f"max_queued_requests = {limit}; send fewer at a time or raise it"
            )
        if not self._live:  # idle time is no hang, and no part of the throughput
            self.last_step_time = time.monotonic()
            self._window = (self.last_step_time, self.num_output_tokens)
        for request in requests:
            self.scheduler.check(request)
        # They come at once, and none of those that may go on for longest is to begin as the last.
        for request in sorted(requests, key=lambda request: -request.mates[0].max_new_tokens):
            self._live[request.rid] = request
            self.scheduler.add(request)
            if request.skips_forced:
                self._report(request, 0, foresee(request))

    def _abort(self, rids: list[str] | None, message: str) -> None:
        for rid in list(self._live) if rids is None else rids:
            request = self._live.get(rid)
            if request is not None:
                self._finish(request, outputs.abort_reason(message))

    def _abandon(self, requests: list[Request]) -> None:
        for request in requests:
            if self._live.get(request.rid) is request:  # not another one of that name
                self._finish(request, outputs.abort_reason("abandoned by its caller"))

    def _end(self) -> None:
        """Tells everyone still waiting. The scheduler is past use: after an error its books may be
        wrong."""
        message = f"the engine failed: {self.error!r}" if self.error else "the engine was shut down"
        reason = outputs.abort_reason(message, status_code=500 if self.error else None)
        for request in list(self._live.values()):
            request.status, request.finish_reason = Status.FINISHED, reason
            self._report_end(request)
        try:
            self.runner.close()
            if self._on_end is not None:
                self._on_end()
        finally:
            self._has_ended = True  # before the last look: what comes later is answered by `call`
            self._inbox.refuse(self.refusal)

    def refusal(self) -> RuntimeError:
        """Why a loop that has ended takes no more requests."""
        if self.error is None:
            return RuntimeError(
                "this engine was shut down and takes no more requests; make a new one"
            )
        refusal = RuntimeError(f"this engine failed and takes no more requests: {self.error!r}")
        refusal.__cause__ = self.error
        return refusal
