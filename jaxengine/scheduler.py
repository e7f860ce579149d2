"""Which rows run how many tokens in the next step, and on which pages. Host only: no arrays.

One rule serves everything: a running request has some pending tokens (known, or drawn but not yet
seen), and a step computes as many of them as the budget allows. Decoding is a row with one pending
token; a prompt, a chunk of one, the rest behind a prefix hit and the rebuilding of a retracted
request are rows with more. Where all rows decode, one launch may do several steps.

The device runs steps in order. So what one step writes the next may read, pages and slots of a
request that ended may be reused at once though a step of it is in flight, and pages may be shared
by rows of the very step that writes them: a layer writes the K and V of all rows before it reads.
"""

from collections.abc import Sequence
from typing import Any

from jaxengine.growth import Growth
from jaxengine.kv_pool import KVPool
from jaxengine.next_row import next_row
from jaxengine.prefix_tree import Node
from jaxengine.request import Request, Status
from jaxengine.step_plan import Row, StepPlan, states_of, wanted_of
from jaxengine.waiting import WaitingQueue

ADMISSION_GROUPS = 16  # a long queue is admitted by so many parts of the slots


class Scheduler:
    """Queue, slots and pages of all unfinished requests."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_running_requests: int,
        chunk_size: int,
        can_chunk: bool = True,
        mixes_decode: bool = True,
        policy: str = "fcfs",
        uses_priority: bool = False,
        low_priority_first: bool = False,
        shares_prefixes: bool = True,
        conservativeness: float = 1.0,
        decode_steps: int = 1,
        max_decode_rows: int | None = None,
        random_seed: int = 0,
    ):
        if decode_steps > page_size:
            raise ValueError(f"decode_steps: expected at most {page_size}, got {decode_steps}")
        self.kv = KVPool(num_pages, page_size, shares_prefixes)
        self.running: list[Request] = []
        self.halts: set[str] = set()  # why nothing is to be scheduled
        self._waiting = WaitingQueue(policy, uses_priority, low_priority_first, random_seed)
        self._retracted: list[tuple[Request, int]] = []
        self._free_slots = list(range(max_running_requests - 1, -1, -1))
        self._max_running = max_running_requests
        self._chunk_size = chunk_size
        self._can_chunk = can_chunk
        self._mixes_decode = mixes_decode
        self._decode_steps = decode_steps
        self._max_decode_rows = max_running_requests if max_decode_rows is None else max_decode_rows
        self._growth = Growth(page_size, conservativeness)

    # Queue

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.num_waiting

    @property
    def is_halted(self) -> bool:
        return bool(self.halts)

    @property
    def rests(self) -> bool:
        """Whether there is nothing to schedule before somebody calls."""
        return self.is_halted or self.is_idle

    def check(self, request: Request) -> None:
        """Raises ValueError for a new request that could not run, with its group, even alone."""
        num_pages = sum(self.kv.num_pages(mate.num_to_compute) for mate in request.mates)
        size = len(request.group)
        who = f"group: {size} requests that run at once" if size else f"request {request.rid}"
        if num_pages > self.kv.pool.num_pages:
            raise ValueError(
                f"{who}: expected at most {self.kv.pool.num_pages} pages, all of the KV pool, got "
                f"{num_pages}; ask for fewer tokens or raise max_total_tokens"
            )
        if size > self._max_running:
            raise ValueError(
                f"{who}: expected at most max_running_requests = {self._max_running}; raise it, or "
                "make the group smaller"
            )

    def add(self, request: Request) -> None:
        """Queues a new request; one of a group with all others of it, before the next step."""
        self._waiting.add(request)

    def finish(self, request: Request, reason: dict[str, Any], keeps_prefix: bool = True) -> None:
        """Ends a request wherever it stands. Its full pages stay in the prefix tree as a cache,
        unless what they hold is not to be trusted."""
        if request.status is Status.RUNNING:
            self._release(request, keeps_prefix)
        elif request.status is Status.WAITING:
            self._waiting.drop()
        request.status = Status.FINISHED
        request.finish_reason = reason

    def flush_cache(self) -> bool:
        """Forgets every cached prefix; refused while a request runs or waits."""
        if self.is_idle:
            self.kv.forget_prefixes()
        return self.is_idle

    def start_over(self) -> int:
        """Sends back whatever runs and forgets every prefix, so that nothing which was computed is
        used again; returns how many requests ran. Their outputs so far stay."""
        num_running = len(self.running)
        while self.running:
            self._retract(self.running[-1])
        self.kv.forget_prefixes()
        return num_running

    # One step

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before a result arrives."""
        if self.is_halted:
            return None
        runnable = [request for request in self.running if request.can_run]
        has_retracted = self._retract_for_growth(runnable)
        decoding: list[Request] = []
        reading: list[Request] = []
        for request in runnable:
            if request.num_pending > 1:
                reading.append(request)
            elif not request.group or _can_draw(request):
                decoding.append(request)
        num_steps = 1 if reading or has_retracted else self._num_steps(decoding)
        rows: list[Row] = []
        if self._mixes_decode:
            self._decode(rows, decoding, num_steps)
        budget = self._read(rows, reading, self._chunk_size - len(rows))
        admitted = [] if has_retracted else self._admit(rows, budget)
        if not rows:
            self._decode(rows, decoding, num_steps)
        if not rows:
            return None
        self._growth.fall(num_steps)
        return self._plan(rows, admitted, num_steps)

    def _plan(self, rows: list[Row], admitted: list[Request], num_steps: int) -> StepPlan:
        num_tokens = sum(row.query_len for row in rows)
        num_steps = num_steps if num_tokens == len(rows) else 0
        asking = [row for row in rows if row.request.asks_more]
        return StepPlan(
            tuple(rows),
            tuple(admitted),
            self._take_retracted(),
            num_tokens,
            num_steps,
            wanted=wanted_of(asking),
            states=states_of(asking),
            pauses=any(row.request.pauses for row in asking),
        )

    def _num_steps(self, decoding: Sequence[Request]) -> int:
        """Steps to decode in one launch: several if all there is to do is decoding, nobody waits
        for each token or has a say in it, and every row could have a page."""
        has_candidates = self.num_waiting > 0 and not self._holds_back
        has_many = len(decoding) > min(self._max_decode_rows, self.kv.num_available)
        if has_candidates or has_many or not decoding:
            return 1
        longest = max(request.num_to_compute - request.num_computed for request in decoding)
        at_once = min(1 if r.pauses else r.stream_interval or longest for r in decoding)
        # In a group none draws beyond the end of another.
        ends = (r.num_to_compute - r.num_computed for r in decoding if r.group)
        shortest = min(ends, default=longest)
        return self._decode_steps if min(shortest, at_once) >= self._decode_steps else 1

    def _decode(self, rows: list[Row], requests: Sequence[Request], num_steps: int) -> None:
        chosen = requests[: self._chunk_size]
        rows.extend(next_row(self.kv, request, 1, num_steps) for request in chosen)

    def _read(self, rows: list[Row], requests: Sequence[Request], budget: int) -> int:
        """Adds rows of prompts that are being read; returns what is left of `budget` tokens."""
        for request in requests:
            if budget:
                # The last token of one in a group is read when all of that can draw.
                num_wanted = min(request.num_pending - bool(request.group), budget)
                rows.append(next_row(self.kv, request, num_wanted))
                budget -= rows[-1].query_len
                self.kv.share(request)
        return budget

    # Admission

    @property
    def _holds_back(self) -> bool:
        """Whether those who wait go on waiting for slots. A long queue is admitted by groups: a few
        large steps that read prompts cost less than many small ones, and than the idle slots."""
        group = max(1, self._max_running // ADMISSION_GROUPS)
        return len(self._free_slots) < min(group, self.num_waiting)

    def _admit(self, rows: list[Row], budget: int) -> list[Request]:
        """Starts waiting requests in the queue's order while tokens, slots and pages last."""
        admitted: list[Request] = []
        if not self.num_waiting or self._holds_back:
            return admitted
        reserve = self._growth.num_pages(self.running)
        has_room = not self.running or reserve < self.kv.num_available
        while has_room and budget and (window := self._waiting.take(self.kv.num_shared)):
            for group in window:
                has_room = has_room and self._start(group, budget, reserve)
                if has_room:
                    admitted += group
                    budget = self._begin(rows, group, budget)
                    reserve += self._growth.num_pages(group)
                else:
                    self._waiting.put_back(group)
        return admitted

    def _begin(self, rows: list[Row], group: Sequence[Request], budget: int) -> int:
        """Adds the first rows of what was just started; returns what is left of `budget`."""
        if group[0].group and _can_draw(group[0]):
            self._decode(rows, group, num_steps=1)
            return budget - len(group)
        return self._read(rows, [r for r in group if r.num_pending > 1 or not r.group], budget)

    def _start(self, group: Sequence[Request], budget: int, reserve: float) -> bool:
        """Gives waiting requests slots and pages, or returns False where they have to wait on."""
        if min(budget, len(self._free_slots)) < len(group) or any(r.in_flight for r in group):
            return False
        paths = [self.kv.match(request) for request in group]
        if not self._fits(group, paths, budget, reserve):
            return False
        self.kv.begin(group, paths)
        for request in group:
            if request.num_cached is None:
                request.num_cached = min(request.num_computed, len(request.prompt_ids))
            request.slot = self._free_slots.pop()
            request.unsent.clear()  # all tokens come with it
            request.status = Status.RUNNING
            self.running.append(request)
        return True

    def _fits(
        self,
        group: Sequence[Request],
        paths: Sequence[Sequence[Node]],
        budget: int,
        reserve: float,
    ) -> bool:
        num_new = sum(r.length for r in group) - self.kv.page_size * sum(map(len, paths))
        if not self._can_chunk and budget < num_new <= self._chunk_size:
            return False  # some later step has room for all of it
        needed: float = self.kv.num_needed(group, paths)
        if self.running:  # alone it has the whole pool
            needed += reserve + self._growth.num_pages(group)
        return needed <= self.kv.num_available

    # Retraction

    def _retract_for_growth(self, runnable: list[Request]) -> bool:
        """Sends back the last comers of `runnable` until all others can have the page they need.

        The first in the queue's order is never sent back, so it ends, and one after another all do.
        Alone it may wait a step for those that have drawn their last token, no longer: all pages
        but its own are then free or evictable (`PrefixTree.insert` keeps it so).
        """
        has_retracted = False
        if len(runnable) <= self.kv.num_available:
            return has_retracted
        num_needed = sum(map(self.kv.lacks_page, runnable))
        while num_needed > self.kv.num_available:
            last = max(runnable, key=lambda request: request.order)
            mates = last.mates
            num_needed -= sum(self.kv.lacks_page(r) for r in runnable if r in mates)
            runnable[:] = [request for request in runnable if request not in mates]
            if runnable:
                self._retract(last)
                self._growth.rise()
                has_retracted = True
        return has_retracted

    def _retract(self, request: Request) -> None:
        """Sends back a request, with its group."""
        group = [mate for mate in request.mates if mate.status is Status.RUNNING]
        for mate in group:
            self._retracted.append((mate, mate.slot))
            self._release(mate)
            mate.num_computed = 0
            mate.num_retractions += 1
            mate.status = Status.WAITING
        self._waiting.put_back(group)

    def _take_retracted(self) -> tuple[tuple[Request, int], ...]:
        taken, self._retracted = tuple(self._retracted), []
        return taken

    def _release(self, request: Request, keeps_prefix: bool = True) -> None:
        """Takes slot and pages from a running request."""
        self.kv.end(request, keeps_prefix)
        self._free_slots.append(request.slot)
        request.slot = -1
        self.running.remove(request)

    def check_integrity(self) -> None:
        """Raises unless every page and slot has exactly one owner."""
        self.kv.check_integrity(self.running)
        slots = sorted(self._free_slots + [request.slot for request in self.running])
        if slots != list(range(self._max_running)):
            raise RuntimeError(f"slots corrupt: {slots}")


def _can_draw(request: Request) -> bool:
    """Whether the next step can draw for all of its group, as each has one token left to read."""
    return all(
        mate.num_pending == 1 for mate in request.mates if mate.status is not Status.FINISHED
    )
